"""Understands attention masks by evaluating them on sample padding.

A mask is understood if, for every sample of valid tokens [B, S], a token sees

    the valid tokens of its own sentence, that its causal order and its window allow,

with a bias that depends on positions alone. Then attention over packed tokens computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from graphquant.ir.aliases import written_in_place
from graphquant.ir.captured import Captured
from graphquant.ir.graph import ancestors, aten, dtype, hint, hints, is_tensor, shape
from graphquant.passes.padding.attention import Attention, is_pointwise
from graphquant.passes.padding.evaluation import (
    CannotEvaluate,
    Constants,
    Evaluation,
    Kept,
    Sizes,
    inputs_of,
    told,
)
from graphquant.passes.padding.samples import (
    FEW,
    Sample,
    Setting,
    named_by,
    one_sentence,
    other_numbers,
    paddings,
    read_by,
    setting_of,
)

BLOCKED = -9e3  # an additive mask below this blocks: some models add -10000
MAX_LENGTH = 2**12  # at which masks of dynamic lengths are evaluated
MAX_ELEMENTS = 2**28  # of a mask
NO_MASK = "attention reads no padding mask"
SPARSE = 16  # of so many queries and keys, one is compared before all are


@dataclass(frozen=True)
class PaddingMask:
    """The value [B, S] that says which tokens are valid: those that are not 0, or if inverted those
    that are 0.

    exact  every number but 0 is the same to the model; else only 0 and 1 were tried
    """

    node: Node
    inverted: bool
    exact: bool = True


@dataclass(frozen=True)
class Form:
    """What an attention computes besides the padding mask: scale q k^T + bias, for the keys that
    are not later than the query (causal) and not further away than `window` positions.

    bias  [B or 1, H or 1, S, S], equal for all sentences; or [H, S, S], or [S, S]
    """

    scale: float
    causal: bool = False
    window: int | None = None
    bias: Node | None = None

    def __str__(self) -> str:
        window = [] if self.window is None else [f"window {self.window}"]
        return ", ".join(["causal"] * self.causal + window + ["bias"] * (self.bias is not None))


class Masks:
    """The padding masks and forms of a graph's attentions. Equal masks are evaluated once.

    every_query  a mask must say the same for queries at padding, whose results are used as well,
                 and is exact only if negative numbers are as good as others

    To be used without fake mode and without gradients.
    """

    def __init__(self, captured: Captured, *, every_query: bool = False) -> None:
        self._captured = captured
        self._every_query = every_query
        self._forms: dict[Any, tuple[PaddingMask, Form] | Kept] = {}
        self._few: dict[Node, int] = {}
        self._samples: dict[Any, list[Sample]] = {}
        self._constants: dict[Any, Constants] = {}

    @cached_property
    def _floats(self) -> dict[Node, float]:
        """Values at compile time of Python floats that Dynamo made inputs, such as a scale that is
        an attribute of a module, if sizes are dynamic."""
        items = self._captured.gm.graph.find_nodes(op="call_function", target=aten.item.default)
        values = ((n, n.meta["val"]) for n in items)
        return {
            n: value.node.hint
            for n, value in values
            if isinstance(value, torch.SymFloat) and value.node.has_hint()
        }

    @cached_property  # many graphs have no mask
    def _written(self) -> set[Node]:
        return written_in_place(self._captured.gm.graph)

    def understand(self, attention: Attention) -> tuple[PaddingMask, Form]:
        """Raises Kept if this attention is more than its form."""
        key = self._key(attention)
        if key not in self._forms:
            try:
                self._forms[key] = self._find(attention)
            except Kept as why:
                self._forms[key] = why
        found = self._forms[key]
        if isinstance(found, Kept):
            raise Kept(*found.args)
        for node in self._floats.keys() & read_by(attention):
            float(node.meta["val"])  # adds a guard: another number is compiled again
        mask, form = found
        if not form.scale > 0:
            raise Kept(f"attention with a scale of {form.scale:g}")
        return mask, form if attention.score is not None else replace(form, scale=attention.scale)

    def _key(self, attention: Attention) -> Any:
        """Equal for attentions whose logits are computed alike from the same operands."""

        def text(node: Node) -> str:
            if node is attention.score:
                return "score"
            if node in self._floats:
                return repr(self._floats[node])
            if node not in attention.inner:
                return node.name
            read = torch.fx.node.map_arg((node.args, node.kwargs), text)
            return f"{node.target}{read}"

        logits, mask = attention.logits, attention.mask
        own = text(logits) if logits is not None else mask and mask.name
        return own, attention.is_causal, *map(str, (*shape(attention.q)[:3], shape(attention.k)[1]))

    def _find(self, attention: Attention) -> tuple[PaddingMask, Form]:
        """The first [B, S] value that alone decides the mask, exactly if there is one."""
        operands = attention.operands
        read = inputs_of(self._captured, operands)
        if not read:
            raise Kept(NO_MASK)
        if written := self._written & read_by(attention):
            raise Kept(f"{told(self._captured, min(written))} is written in place")
        inexact: tuple[PaddingMask, Form] | None = None
        why: Kept | None = None
        for node in self._candidates(attention):
            for inverted in (False, True):
                mask = PaddingMask(node, inverted)
                try:
                    form = self._form(attention, mask)
                except Kept as reason:
                    why = why or reason
                    continue
                numbers = ("mixed", "negative") if self._every_query else ("mixed",)
                if all(self._is_same(attention, mask, n) for n in numbers):
                    return mask, form
                if self._is_same(attention, mask, "one number"):  # of documents in a sentence
                    why = why or Kept("an attention mask tells tokens apart by their numbers")
                elif inexact is None and not _is_index(node):
                    inexact = replace(mask, exact=False), form
        if inexact is not None:
            return inexact
        if why is not None:
            raise why
        names = ", ".join(told(self._captured, n) for n in read)
        raise Kept(f"an attention mask is computed from {names}, not from one padding mask [B, S]")

    def _candidates(self, attention: Attention) -> Iterator[Node]:
        B, _, S, _ = hints(attention.q)
        operands = attention.operands
        for node in sorted(ancestors(operands)):
            if (
                is_tensor(node)
                and hints(node) == (B, S)
                and node not in self._captured.parameters
                and not inputs_of(self._captured, operands, cut={node})
                and self._is_pointwise(node)
            ):
                yield node

    def _is_pointwise(self, node: Node) -> bool:
        """Does each of its numbers depend on those of inputs at the same place only?"""
        read = inputs_of(self._captured, [node])
        sizes = hints(node)
        return bool(read) and all(
            n in read or (is_pointwise(n) and hints(n) == sizes)
            for n in ancestors([node])
            if inputs_of(self._captured, [n])
        )

    def _form(self, attention: Attention, mask: PaddingMask) -> Form:
        """Raises Kept if the mask is not that of a form."""
        settings = list(self._settings(attention, mask))
        forms = [self._form_at(attention, mask, setting) for setting in settings]
        longest = max(range(len(settings)), key=lambda i: settings[i].S)
        for setting, form in zip(settings, forms, strict=True):
            if not _is_form(forms[longest], form, setting.S):
                raise Kept("an attention mask has another form at other sizes")
        return forms[longest]

    def _sentences(self, attention: Attention, mask: PaddingMask) -> int:
        """How many sentences to evaluate: all, if the graph names their number."""
        B, _, S, _ = hints(attention.q)
        if B <= FEW or B in named_by(attention):
            return B
        if mask.node not in self._few:
            few = torch.zeros(FEW, S, dtype=dtype(mask.node))
            try:
                at = self._evaluation({mask.node: few})
                for operand in attention.operands:
                    if mask.node in ancestors([operand]):
                        at(operand)
                self._few[mask.node] = FEW
            except CannotEvaluate:
                self._few[mask.node] = B
        return self._few[mask.node]

    def _evaluation(self, given: Mapping[Node, Tensor], sizes: Sizes | None = None) -> Evaluation:
        key = frozenset((sizes or {}).items())
        if key not in self._constants:
            self._constants[key] = Constants(self._captured, sizes)
        return Evaluation(self._captured, {**self._floats, **given}, sizes, self._constants[key])

    def _settings(self, attention: Attention, mask: PaddingMask) -> Iterator[Setting]:
        """The sizes at compile time. Of dynamic ones also some beyond every number that the mask's
        nodes name, so that a window shows, and a sentence that is not like others."""
        B, _, S, _ = shape(attention.q)
        yield self._checked(Setting(self._sentences(attention, mask), hint(S)))
        beyond = max((n for n in named_by(attention) if n < MAX_LENGTH), default=0) + 2
        longest = hint(S) + beyond if isinstance(S, torch.SymInt) else S
        if longest > MAX_LENGTH:
            raise Kept("an attention mask names a length that is too long to be evaluated")
        if isinstance(B, torch.SymInt):
            most = hint(B) + beyond
            length = longest if most * longest**2 <= MAX_ELEMENTS else hint(S)
            yield self._checked(setting_of(attention, most, length))
        if isinstance(S, torch.SymInt):
            yield self._checked(
                setting_of(attention, FEW if isinstance(B, torch.SymInt) else B, longest)
            )

    def _checked(self, setting: Setting) -> Setting:
        if setting.B * setting.S**2 > MAX_ELEMENTS:
            raise Kept("an attention mask is too large to be evaluated")
        return setting

    def _form_at(self, attention: Attention, mask: PaddingMask, setting: Setting) -> Form:
        samples = self._sampled(mask, setting)
        whole = samples[0]
        # which keys a sentence without padding sees, and its bias
        P, base = _seen(attention, whole.at, whole.full, setting.S)
        for sample in samples:
            queries = self._queries(sample.valid)
            for b in sample.compared(attention):
                if sample.valid[b].all() and _is_like(attention, sample, b, whole, whole.full):
                    continue
                seen, bias = _seen(attention, sample.at, b, setting.S)
                want = P & sample.valid[b]
                if why := _difference(seen, bias, want, base, queries[b]):
                    raise Kept(why)
            if self._every_query and attention.adds and _sees_none(P, sample.valid):
                raise Kept("a query at padding sees no key, and so the mean of all of them")
        if not torch.equal(P, P[:1].expand_as(P)):
            raise Kept("attention heads have masks of their own")
        causal, window = _order(P[0])
        found = None
        if bool((base.expand(*P.shape).masked_fill(~P, 0) != 0).any()):
            found = self._bias(attention, mask, whole, base, P)
        scale = 1.0 if attention.score is None else _scale(attention, whole, base, P)
        return Form(scale, causal, window, found)

    def _is_same(self, attention: Attention, mask: PaddingMask, numbers: str) -> bool:
        """Is the mask the same with other numbers than 0 and 1?"""
        if dtype(mask.node) == torch.bool:
            return True
        setting = next(self._settings(attention, mask))
        samples = [self._sampled(mask, setting, n)[0] for n in ("", numbers)]
        for b in samples[1].compared(attention):
            if _is_like(attention, samples[0], b, samples[1], b):
                continue
            (a, x), (c, y) = (_seen(attention, s.at, b, setting.S) for s in samples)
            rows = self._queries(samples[0].valid)[b][:, None]
            if ((a != c) & rows).any() or ((x != y) & a & rows).any():
                return False
        return True

    def _queries(self, valid: Tensor) -> Tensor:
        """Whose results are used, [B, S]."""
        return torch.ones_like(valid) if self._every_query else valid

    def _sampled(self, mask: PaddingMask, setting: Setting, numbers: str = "") -> list[Sample]:
        """Samples of padding, with other `numbers` than 1: "mixed", "negative" or "one number"."""
        key = (mask.node, mask.inverted, setting.B, setting.S, numbers)
        if key not in self._samples:
            made = self._samples[key] = []
            for valid, like in paddings(setting.B, setting.S):
                nonzero = ~valid if mask.inverted else valid
                value = nonzero.to(dtype(mask.node))
                if numbers:
                    value = value * other_numbers(value, numbers)[like]
                at = self._evaluation({mask.node: value}, setting.sizes)
                made.append(Sample(valid, like, at))
        return self._samples[key]

    def _bias(
        self, attention: Attention, mask: PaddingMask, sample: Sample, base: Tensor, P: Tensor
    ) -> Node:
        """The smallest value of the graph that is the bias and does not depend on the mask."""
        candidates = [
            n
            for n in ancestors(attention.operands)
            if is_tensor(n)
            and 2 <= len(hints(n)) <= 4
            and n.meta["val"].is_floating_point()
            and mask.node not in ancestors([n])
        ]
        for node in sorted(candidates, key=lambda n: (math.prod(hints(n)), -len(hints(n)), n)):
            if _is_bias(node, sample, base, P):
                return node
        raise Kept("an attention bias is not a value of the graph")


def _is_like(attention: Attention, one: Sample, b: int, other: Sample, c: int) -> bool:
    """Are the masks of two sentences computed from equal numbers, and so equal as well?"""
    return all(
        torch.equal(one_sentence(n, one.at, b), one_sentence(n, other.at, c))
        for n in attention.operands
        if is_tensor(n)
    )


def _is_bias(node: Node, sample: Sample, base: Tensor, P: Tensor) -> bool:
    """Is this value the bias of all sentences, for the keys that are seen?"""
    value = one_sentence(node, sample.at, 0)
    if value.shape[-2:] != base.shape[-2:] or len(value) not in (1, len(base)):
        return False
    others = range(1, len(sample.valid)) if len(hints(node)) == 4 else ()
    return _close(value, base, P, 1e-5) and all(sample.at.equal_rows(node, 0, b) for b in others)


def _is_form(form: Form, found: Form, S: int) -> bool:
    """Is a form what was found at length S, at which a wide window does not show?"""
    shows = form.window is not None and form.window < S - 1
    same = replace(form, window=form.window if shows else None, scale=found.scale) == found
    return same and math.isclose(form.scale, found.scale, rel_tol=1e-5)  # it is measured


def _is_index(node: Node) -> bool:
    """Token ids, which are not 0 and 1."""
    return any(u.target is aten.embedding.default for u in node.users)


def _seen(attention: Attention, at: Evaluation, b: int, S: int) -> tuple[Tensor, Tensor]:
    """(which keys are seen, bias) of one sentence, [h, S, S]; h may be 1."""
    bias: Tensor
    if attention.score is not None:
        bias = _logits(attention, at, torch.zeros(1, 1, S, S), b)
    elif attention.mask is not None:
        bias = one_sentence(attention.mask, at, b)
    else:
        bias = torch.ones(1, 1, 1, dtype=torch.bool)
    bias = bias.expand(-1, S, S)
    seen = bias if bias.dtype == torch.bool else bias > BLOCKED
    if bias.dtype == torch.bool:
        bias = torch.zeros(1, 1, 1).expand(1, S, S)
    if attention.is_causal:
        seen = seen & torch.ones(S, S, dtype=torch.bool).tril()
    return seen, bias


def _logits(attention: Attention, at: Evaluation, score: Tensor, b: int) -> Tensor:
    """The logits of a written-out attention for this q k^T, of one sentence."""
    assert attention.score is not None and attention.logits is not None
    given = {attention.score: score.to(dtype(attention.score))}
    return one_sentence(attention.logits, at.given(given), b)


def _difference(
    seen: Tensor, bias: Tensor, want: Tensor, base: Tensor, queries: Tensor
) -> str | None:
    """How the mask of a sentence differs from the keys that it is wanted to see and from the bias
    without padding, for the queries [S] that count; None if it does not."""
    rows = queries[:, None]
    if ((seen != want) & rows).any():
        return "an attention mask is not a padding mask"
    if not _close(bias, base, want & rows, 1e-6):
        return "an attention bias depends on the padding"
    return None


def _close(a: Tensor, b: Tensor, seen: Tensor, tolerance: float) -> bool:
    """torch.allclose with this rtol and atol, where `seen`; faster if not or all is equal."""
    heads = list(zip(*torch.broadcast_tensors(a, b, seen), strict=True))
    return all(
        _head_is_close(x[::step, ::step], y[::step, ::step], at[::step, ::step], tolerance)
        for step in (SPARSE, 1)
        for x, y, at in heads
    )


def _head_is_close(a: Tensor, b: Tensor, seen: Tensor, tolerance: float) -> bool:
    if not ((a != b) & seen).any():
        return True
    mine, theirs = (t.masked_fill(~seen, 0).double() for t in (a, b))
    return torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)


def _sees_none(P: Tensor, valid: Tensor) -> bool:
    """Is there a query that sees no key?"""
    return any(not (P & keys).any(-1).all() for keys in valid[:FEW])


def _order(P: Tensor) -> tuple[bool, int | None]:
    """(causal, window) of which keys each query sees, [S, S]."""
    S = len(P)
    i, j = torch.arange(S)[:, None], torch.arange(S)[None]
    causal = S > 1 and not bool(P.triu(1).any())
    reach = int((i - j).abs()[P].max()) if bool(P.any()) else 0
    full = j <= i if causal else torch.ones(S, S, dtype=torch.bool)
    if torch.equal(P, full):
        return causal, None
    if torch.equal(P, full & ((i - j).abs() <= reach)):
        return causal, reach
    raise Kept("an attention mask is neither full, nor causal, nor a window")


def _scale(attention: Attention, sample: Sample, base: Tensor, P: Tensor) -> float:
    """The factor of q k^T in the logits of a written-out attention."""
    random = torch.Generator().manual_seed(1)
    S = P.shape[-1]
    score = torch.randn(1, 1, S, S, generator=random)
    logits = _logits(attention, sample.at, score, sample.full).expand(-1, S, S)
    values = (logits, base.expand_as(logits), score[0].expand_as(logits), P.expand_as(logits))
    few = [t[..., ::SPARSE, ::SPARSE] if S > SPARSE**2 else t for t in values]
    with_score, without, change = (t[few[-1]].double() for t in few[:-1])
    scale = float(((with_score - without) / change).median())
    near = 1e-4 if base.dtype == torch.float32 else 1e-2
    if not _close(logits, base + scale * score[0], values[-1], near):
        raise Kept("attention logits are not scale q k^T + bias")
    return scale
