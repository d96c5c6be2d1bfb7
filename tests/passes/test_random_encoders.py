"""Random encoders: whatever is drawn, int8 agrees with float and nothing is lost on the way.

What is drawn is a description, which prints and shrinks well; the weights come from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models import relative, same_structure
from tests.passes.graphs import compiled, rewritten
from tests.passes.simulated import Int8Linears

ACTS: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "new_gelu": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu_": lambda x: F.relu(x, inplace=True),
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,  # no op knows it
}


@dataclass(frozen=True)
class Block:
    """One layer. The names of fields are those of parts; see _Block for what each does."""

    norm: str
    pre: bool
    parallel: bool
    qkv: str
    bias: tuple[bool, bool, bool, bool]
    act: str
    gated: bool
    hidden: int
    scale: str
    in_place: bool
    flat: bool
    swapped: bool
    dropout: bool
    reads: str


@dataclass(frozen=True)
class Encoder:
    blocks: tuple[Block, ...]
    heads: int
    groups: int
    head: int
    inputs: int
    batch: int
    tokens: int
    dtype: torch.dtype
    autocast: bool
    seed: int

    @property
    def width(self) -> int:
        return self.heads * self.head


blocks = st.builds(
    Block,
    norm=st.sampled_from(["layer", "rms", "layer spelled", "rms spelled", "no affine"]),
    pre=st.booleans(),
    parallel=st.booleans(),
    qkv=st.sampled_from(["separate", "packed", "gqa"]),
    bias=st.tuples(*[st.booleans()] * 4),
    act=st.sampled_from(list(ACTS)),
    gated=st.booleans(),
    hidden=st.integers(17, 90),
    scale=st.sampled_from(["none", "vector", "first", "broadcast", "token"]),
    in_place=st.booleans(),
    flat=st.booleans(),
    swapped=st.booleans(),
    dropout=st.booleans(),
    reads=st.sampled_from(["", "", "norm", "q", "attention", "act", "stream"]),
)
encoders = st.builds(
    Encoder,
    blocks=st.lists(blocks, min_size=1, max_size=2).map(tuple),
    heads=st.sampled_from([2, 4]),
    groups=st.sampled_from([1, 2]),
    head=st.integers(5, 14),
    inputs=st.integers(16, 40),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    autocast=st.booleans(),
    seed=st.integers(0, 99),
)


class _Norm(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.gamma = nn.Parameter(1 + 0.3 * torch.randn(width))
        self.beta = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), self.gamma, self.beta, 1e-5)
        if self.kind == "rms":
            return F.rms_norm(x, (self.width,), self.gamma, 1e-6)
        if self.kind == "no affine":
            return F.layer_norm(x, (self.width,))
        h = x.float()
        if self.kind == "rms spelled":
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.gamma * h.to(x.dtype)
        h = h - h.mean(-1, keepdim=True)
        h = h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-5)
        return (h * self.gamma + self.beta).to(x.dtype)


class _Block(nn.Module):
    def __init__(self, block: Block, encoder: Encoder) -> None:
        super().__init__()
        D, b = encoder.width, block.bias
        self.block, self.heads, self.head = block, encoder.heads, encoder.head
        self.groups = encoder.groups if block.qkv == "gqa" else encoder.heads
        self.norm1, self.norm2 = _Norm(block.norm, D), _Norm(block.norm, D)
        if block.qkv == "packed":
            self.qkv = nn.Linear(D, 3 * D, bias=b[0])
        else:
            small = self.groups * self.head
            self.q = nn.Linear(D, D, bias=b[0])
            self.k, self.v = nn.Linear(D, small, bias=b[1]), nn.Linear(D, small, bias=b[2])
        self.out = nn.Linear(D, D, bias=b[3])
        self.up = nn.Linear(D, block.hidden, bias=b[1])
        self.gate = nn.Linear(D, block.hidden, bias=b[2]) if block.gated else None
        self.down = nn.Linear(block.hidden, D, bias=b[3])
        size = {"broadcast": (1, 1, D), "token": (1, encoder.tokens, 1)}.get(block.scale, (D,))
        self.gamma1, self.gamma2 = (nn.Parameter(torch.randn(size)) for _ in range(2))
        self.dropout = nn.Dropout(0.5) if block.dropout else nn.Identity()

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        block = self.block
        if block.parallel:
            h = self._read("norm", self.norm1(x), seen)
            return self._add(
                self._add(x, self._attend(h, seen), self.gamma1), self._feed(h, seen), self.gamma2
            )
        if block.pre:
            h = self._read("norm", self.norm1(x), seen)
            x = self._add(x, self._attend(h, seen), self.gamma1)
            x = self._read("stream", x, seen)
            return self._add(x, self._feed(self.norm2(x), seen), self.gamma2)
        x = self._read("norm", self.norm1(self._add(x, self._attend(x, seen), self.gamma1)), seen)
        return self.norm2(self._add(x, self._feed(x, seen), self.gamma2))

    def _read(self, what: str, value: Tensor, seen: list[Tensor]) -> Tensor:
        """Somebody else may look at the value as well."""
        if self.block.reads == what:
            seen.append(value * 2)
        return value

    def _add(self, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        y = self.dropout(y)
        if self.block.scale != "none":
            y = gamma * y if self.block.scale == "first" else y * gamma
        if self.block.in_place:
            x += y
            return x
        return x + y

    def _attend(self, h: Tensor, seen: list[Tensor]) -> Tensor:
        B, S, _ = h.shape
        rows = h.transpose(0, 1) if self.block.swapped else h
        if self.block.qkv == "packed":
            q, k, v = self.qkv(rows).chunk(3, -1)
        else:
            q, k, v = self.q(rows), self.k(rows), self.v(rows)
        self._read("q", q, seen)
        if self.block.swapped:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        q, k, v = (t.reshape(B, S, -1, self.head).transpose(1, 2) for t in (q, k, v))
        if self.groups != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, -1)
        return self.out(self._read("attention", y, seen))

    def _feed(self, h: Tensor, seen: list[Tensor]) -> Tensor:
        B, S, D = h.shape
        rows = h.reshape(B * S, D) if self.block.flat else h
        act = ACTS[self.block.act]
        y = act(self.up(rows)) if self.gate is None else act(self.gate(rows)) * self.up(rows)
        y = self.down(self.dropout(self._read("act", y, seen)))
        return y.view(B, S, D)


class EncoderModel(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.autocast = encoder.autocast and encoder.dtype == torch.float32
        self.embed = nn.Linear(encoder.inputs, encoder.width)
        self.blocks = nn.ModuleList(_Block(b, encoder) for b in encoder.blocks)
        self.norm = nn.LayerNorm(encoder.width)
        self.head = nn.Linear(encoder.width, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        x = self.embed(x)
        if self.autocast:
            with torch.autocast("cpu", torch.bfloat16):
                for block in self.blocks:
                    x = block(x, seen)
        else:
            for block in self.blocks:
                x = block(x, seen)
        return self.head(self.norm(x)), x, *seen


@settings(max_examples=settings().max_examples * 25 // 60)
@given(encoders)
def test_a_random_encoder_is_rewritten_whole_and_right(encoder: Encoder) -> None:
    torch._dynamo.reset()
    torch.manual_seed(encoder.seed)
    model = EncoderModel(encoder).to(encoder.dtype).eval()
    x = torch.randn(encoder.batch, encoder.tokens, encoder.inputs, dtype=encoder.dtype)
    with Int8Linears() as mode:
        simulated = model(x)

    result = compiled(model, x)
    same_structure(result.got, result.want)
    assert len(result.report.linears) == mode.count
    assert all(o.int8 for o in result.report.linears), result.report.reasons()
    assert all(o.rules or o.refused for o in result.report.outcomes)
    half = encoder.dtype != torch.float32 or model.autocast
    # besides int8: float32 noise that moves a value over to the next int8 step, or half precision
    noise = 0.03 if half else 0.005
    for got, want, rounded in zip(result.got, result.want, simulated, strict=True):
        assert relative(got, want) < 1.5 * relative(rounded, want) + noise

    plain = compiled(model, x, quantize=False)
    same_structure(plain.got, plain.want)
    for got, want in zip(plain.got, plain.want, strict=True):
        assert relative(got, want) < (0.02 if half else 1e-5)

    if not model.autocast:  # torch.export puts an autocast region into a graph of its own
        assert rewritten(model, x).counts == result.counts
