"""What of a model's calls counts in a comparison: the padding masks of inputs, and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

from torch import Tensor

from graphquant._torch import original
from graphquant.accuracy.calls import signature
from graphquant.accuracy.outputs import copy_outputs
from graphquant.accuracy.report import Padding
from graphquant.errors import OptionError
from graphquant.ir.tokens import Mask, Masks

PaddingMask = Tensor | str | Callable[..., Tensor] | Literal[False]

# Inputs that are padding masks by their names: 1 or True is a token, or it is padding.
_TOKEN_MASKS = (
    *("attention_mask", "padding_mask", "decoder_attention_mask", "encoder_attention_mask"),
    "pixel_attention_mask",
)
_KEY_PADDING = "key_padding_mask"
_PADDING_MASKS = tuple(prefix + _KEY_PADDING for prefix in ("", "src_", "tgt_", "memory_"))
_FORMS = (
    "a padding mask [B, S], the name of an input, a function from a call's inputs to a padding "
    "mask, or False"
)


class Counted:
    """What counts: the rows that no padding mask leaves out, of all that `of` returns.

    mask  as for `graphquant.compare`
    of    as for `graphquant.compare`

    Raises OptionError for other values of the two.
    """

    def __init__(
        self, model: Callable[..., Any] | None = None, mask: Any = None, of: Any = None
    ) -> None:
        if mask is True or not (
            mask is None or isinstance(mask, (bool, str, Tensor)) or callable(mask)
        ):
            raise OptionError(f"mask is a {type(mask).__name__}, needs {_FORMS}")
        if of is not None and not callable(of):
            raise OptionError(f"of is a {type(of).__name__}, needs a function of the outputs")
        self._takes = signature(original(model))
        self._mask, self._of = mask, of
        self._of_takes_mask = of is not None and "mask" in _parameters(of)
        self._rows: dict[str, tuple[int, int]] = {}
        self._notes: dict[str, None] = {}  # ordered

    # Inputs -------------------------------------------------------------------------------------

    def masks(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Masks:
        """The padding masks of a call with these arguments. Raises OptionError for a bad one."""
        if self._mask is None:
            return Masks(list(self._found(args, kwargs)))
        return Masks(list(self._asked_for(args, kwargs)))

    def _found(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Mask]:
        for name, value in self._inputs(args, kwargs):
            if name in (*_TOKEN_MASKS, *_PADDING_MASKS) and isinstance(value, Tensor):
                try:
                    yield Mask(name, _tokens(name, value))
                except OptionError as why:
                    self._notes[f"no row is taken for padding: {why}"] = None

    def _asked_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Mask]:
        if isinstance(self._mask, str):
            inputs = list(self._inputs(args, kwargs))
            named = [value for name, value in inputs if name == self._mask]
            if not named:
                there = ", ".join(name for name, _ in inputs if name) or "no named ones"
                raise OptionError(
                    f"mask={self._mask!r} is no input of the model: there are {there}"
                )
            for value in named:
                yield Mask(self._mask, _tokens(self._mask, value))
        elif self._mask is not False:
            mask = self._mask if isinstance(self._mask, Tensor) else self._mask(*args, **kwargs)
            yield Mask("mask", _tokens("mask", mask))

    def _inputs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[str, Any]]:
        """(name, value) of each argument, and of what is in mappings."""
        given: Mapping[str, Any] = {"": args, **kwargs}
        if self._takes is not None:
            with suppress(TypeError):  # hooks may take what forward does not
                given = self._takes.bind_partial(*args, **kwargs).arguments
        return _named("", given)

    # Outputs ------------------------------------------------------------------------------------

    def outputs(self, result: Any, masks: Masks) -> dict[str, Tensor]:
        """`copy_outputs` of what counts in a model's result."""
        if self._of_takes_mask:
            if not masks.masks:
                raise OptionError("of takes a mask, but a call has none among its inputs")
            result = self._of(result, mask=masks.masks[0].tokens)
        elif self._of is not None:
            result = self._of(result)
        return copy_outputs(result)

    # Rows ---------------------------------------------------------------------------------------

    def add(self, masks: Masks) -> None:
        """Count the rows of a call, after it. Raises OptionError if a mask that the user asked for
        describes none."""
        if self._mask is not None and masks.masks and not masks.matched:
            (B, S) = masks.masks[0].tokens.shape
            raise OptionError(
                f"mask [{B}, {S}] describes nothing: no linear reads, and the model does not "
                f"return, rows of {B} x {S} tokens"
            )
        for mask in masks.masks if masks.matched else ():
            ignored, rows = self._rows.get(mask.name, (0, 0))
            tokens = int(mask.tokens.sum())
            every = mask.tokens.numel()
            self._rows[mask.name] = ignored + every - tokens, rows + every

    @property
    def padding(self) -> tuple[Padding, ...]:
        """The rows of all calls so far, by mask."""
        return tuple(Padding(name, *rows) for name, rows in self._rows.items())

    @property
    def notes(self) -> tuple[str, ...]:
        """Inputs that are named as padding masks and are none."""
        return tuple(self._notes)


def _parameters(function: Callable[..., Any]) -> Mapping[str, Any]:
    found = signature(function)
    return {} if found is None else found.parameters


def _named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _named(str(key), one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _named("", one)
    else:
        yield name, value


def _tokens(name: str, mask: Any) -> Tensor:
    """[B, S] bool, True for a token. Raises OptionError for what is no padding mask."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise OptionError(f"{name} is {what}, a padding mask is [B, S]")
    inverted = name.endswith(_KEY_PADDING)
    additive = inverted and mask.is_floating_point()  # as torch's attention takes it
    one = mask.isneginf() if additive else mask == 1
    if not bool((one | (mask == 0)).all()):
        values = "0 and -inf" if additive else "0 and 1"
        raise OptionError(f"{name} has values other than {values}")
    tokens = ~one if inverted else one
    if not bool(tokens.any()):
        raise OptionError(f"{name} says that every row is padding")
    return tokens
