"""Random small models as source text, which can be pasted into a bug report.

`write(choose)` writes one: a line after the other is chosen among LINES, on values [B, S, D] that
the lines before it made. Written into memory that others see, read by their strides, kept from call
to call, shared and returned twice are what the lines are about: encoders do all of that somewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Choose = Callable[[Sequence[Any]], Any]

MODES = ("no_grad", "no_grad", "inference_mode")

ACTIVATIONS = (
    "F.gelu({t})",
    "F.relu({t})",
    "F.silu({t})",
    "F.gelu({t}, approximate='tanh')",
    "{t} * torch.sigmoid(1.702 * {t})",
    "F.relu({t}).square()",
    # close to those
    "F.relu6({t})",
    "F.hardswish({t})",
    "F.relu({t}) - F.relu({t} - 6)",
    "F.relu({t}) - F.relu({t} - 20)",
    "F.gelu({t}).clamp(max=8)",
    "torch.minimum(F.silu({t}), {t}.new_tensor(7.0))",
    "0.9 * F.gelu({t})",
    "F.relu({t}) + 0.05 * F.relu({t} - 10).square()",
    "F.leaky_relu({t}, 1e-2)",
    "F.relu({t}, inplace=True)",
)

# {a} and {b} are values, {o}, {p}, {q} new ones, {i}, {j}, {k} numbers of linears
LINES = {
    "linear": (
        "{o} = self.l{i}({a})",
        "{o} = self.l{i}({a}) + {b}",
        "{o} = {b} + self.gamma * self.l{i}({a})",
        "{o} = self.l{i}({a}.transpose(0, 1)).transpose(0, 1)",
        "{o} = self.l{i}({a}.reshape({BS}, {D})).view({B}, {S}, {D})",
        "{o} = self.l{i}(F.layer_norm({a}, ({D},)))",
        "{o} = self.l{i}(self.n{k}({a})) + {b}",
        "{p} = {a} * torch.rsqrt({a}.pow(2).mean(-1, keepdim=True) + 1e-6)\n{o} = self.l{i}({p})",
    ),
    "mlp": (
        "{p} = self.up({a})\n{o} = self.down({act})",
        "{p} = self.up({a})\n{o} = {b} + self.down({act})",
        "{p} = self.up({a})\n{o} = self.down({act} * self.gate({a}))",
        "{p} = self.l{i}({a})\n{o} = {act}",
    ),
    "siblings": (
        "{o}, {p}, {q} = self.l0({a}), self.l1({a}), self.l2({a})",
        "{o}, {p} = self.l{i}({a}), self.l{j}({a})",
        "{q}, {c} = self.l0({a}), self.l1({a})\n{o}, {p} = self.l2({c}), self.l3({c})",
        "{q} = self.l0({a})\n{o} = self.l1({a}) + self.l2({q})\n{p} = self.l3({q})",
        "{c}, {q} = self.up({a}), self.gate({a})\n{o} = self.down({c} * {q})",
        "{o} = F.scaled_dot_product_attention(self.l0({a}), self.l1({a}), self.l2({a}))",
        "{o} = torch.stack([self.l0({a}), self.l1({a})]).mean(0)",
    ),
    "write": (
        "{a}.mul_(1.5)",
        "{a} += {b}",
        "{a}[:, 1:] = {b}[:, 1:]",
        "{a}.transpose(0, 1).add_(0.5)",
        "torch.einsum('bsd->dbs', {a}).mul_(0.5)",
        "torch.broadcast_tensors({a}, {b})[0].mul_(0.5)",
        "{a}.chunk(2, -1)[0].zero_()",
        "{a}.unsafe_chunk(2, -1)[1].neg_()",
        "{a}.view(-1).clamp_(-1, 1)",
        "{a}.unbind(1)[0].copy_({b}[:, -1])",
        "torch.add({a}, {b}, out={a})",
        "torch._foreach_mul_([{a}], 0.5)",
        "{o} = {a}.reshape({BS}, {D})\n{o}.add_(1)\n{o} = {o}.view({B}, {S}, {D})",
        "{o} = {a}.clone()\n{o}[:, :1].zero_()",
        "{p} = self.l{i}({a})\n{p}[..., ::2].mul_(-1)\n{o} = self.l{j}(self.n{k}({p}))",
        "{o} = self.n{k}({a})\n{a}.add_(1)\n{o} = self.l{i}({o})",
    ),
    "state": (
        "self.state.copy_({a})\n{o} = self.l{i}(self.state)",
        "self.state[:, 1:] = {a}[:, 1:]\n{o} = self.l{i}(self.state)",
        "{o} = self.l{i}(self.state)\nself.state.mul_(0.5).add_({a})",
        "self.state.view(-1)[:{D}].mul_(-1)\n{o} = self.l{i}(self.state) + {a}",
        "self.mem[:, :1] = {a}[:, :1]\n{o} = self.l{i}(self.mem)",
        "{o} = self.l{i}(self.mem) + {a}\nself.mem = {a}",
        "self.mem.transpose(0, 1).copy_({a}.transpose(0, 1))\n{o} = self.mem + self.l{i}({a})",
        "self.token.add_(0.5)\n{o} = self.l{i}(self.token) + {a}",
        "self.l0.weight.mul_(0.5)\n{o} = self.l0({a})",
        "self.l0.weight[:2].zero_()\n{o} = self.l1({a}) + self.l0({b})",
        "{o} = self.l0({a})\nself.l0.bias.add_(1)",
        "self.count += 1\n{o} = self.l{i}({a} * self.count)",
    ),
    "token": (
        "{o} = torch.cat([self.token.expand({B}, 1, {D}), {a}[:, 1:]], 1)\n{o} = self.l{i}({o})",
        "{o} = self.token.expand({B}, {S}, {D})",
        "{o} = self.token.expand({B}, {S}, {D}) + self.l{i}({a})",
        "{t} = self.token.expand({B}, -1, -1)\n{p} = torch.cat([{t}, {a}], 1)\n"
        "{t} = {t} + self.l{i}(self.n{k}({p}))[:, :1]\n{o} = torch.cat([{t}, {a}[:, 1:]], 1)",
        "{t} = self.token.expand({B}, 1, -1)\n{p} = {t} + self.l{i}({a}[:, :1])\n"
        "{o} = torch.cat([{t}, {a}[:, 1:]], 1) + {p}",
        "{o} = self.l{i}(self.pos.expand({B}, -1, -1)) + {a}",
    ),
    "strides": (
        "{p} = self.l{i}({a})\n{o} = {p}.as_strided(({B}, {S}, {D}), ({SD}, {D}, 1))",
        "{p} = {b} + self.l{i}({a})\n{o} = {p}.as_strided(({B}, {S}, {D}), ({D}, {BD}, 1))",
        "{p}, {q} = self.l0({a}), self.l1({a})\n{o} = {p}.as_strided({q}.shape, {q}.stride())",
        "{p}, {q} = self.l0({a}), self.l1({a})\n{o} = {p} * {q}.stride(1)",
        "{p}, {q} = self.l0({a}), self.l1({a})\n{o} = {q} if {p}.is_contiguous() else -{q}",
        "{p}, {q} = self.l0({a}), self.odd({a})\n"
        "{o} = {p}.view(torch.int16).view(torch.float32) + {q}.mean()",
        "{p}, {q} = self.l0({a}), self.odd({a})\n{p} = {p}.view({B}, {S}, -1, 2)\n"
        "{o} = torch.view_as_real(torch.view_as_complex({p}) * 1j).flatten(-2) + {q}.mean()",
        "{p}, {q} = self.l0({a}), self.l1({a})\n{o} = {p}.view(-1).view({B}, {S}, {D}) - {q}",
    ),
    "context": (
        "with torch.no_grad():\n    {o} = self.l{i}({a})",
        "with torch.autocast('cpu', torch.bfloat16):\n    {p} = self.l{i}({a})\n{o} = {p}.float()",
        "with torch.autocast('cpu', enabled=False):\n    {o} = self.l{i}(self.n{k}({a}))",
        "with torch.inference_mode():\n    {p} = self.l{i}({a})\n{o} = {p} + {b}",
        "with sdpa_kernel(SDPBackend.MATH):\n"
        "    {o} = F.scaled_dot_product_attention(self.l0({a}), {a}, self.l1({a}))",
    ),
    "break": (
        "torch._dynamo.graph_break()",
        "{p}, {q} = self.l0({a}), self.l1({a})\ntorch._dynamo.graph_break()\n"
        "{o} = {p}.view({BS}, {D}).view({B}, {S}, {D}) + {q}",
        "{p} = self.l{i}({a})\n{q} = {p}[:, :1]\ntorch._dynamo.graph_break()\n"
        "{q}.zero_()\n{o} = self.l{j}({p})",
    ),
}

RETURNS = (
    "{a}",
    "{a}",
    "{a}.reshape(-1)",
    "{a}.view({B}, -1)",
    "{a}.transpose(0, 1)",
    "{a}[:, 0]",
    "{a}.contiguous()",
    "{a}.clone()",
    "{a}.detach()",
    "{a}.chunk(2, -1)",
    "{a}.stride()",
    "self.state",
    "self.mem",
    "x",
)

PARTS = {
    "up": "nn.Linear({D}, 40)",
    "gate": "nn.Linear({D}, 40)",
    "down": "nn.Linear(40, {D})",
    "odd": "nn.Linear({D}, 3)",
    "gamma": "nn.Parameter(torch.randn({D}))",
    "token": "nn.Parameter(torch.randn(1, 1, {D}))",
    "pos": "nn.Parameter(torch.randn(1, {S}, {D}))",
    "state": "nn.Buffer(torch.randn({B}, {S}, {D}))",
    "mem": "torch.randn({B}, {S}, {D})",
    "count": "0",
    **{f"l{i}": "nn.Linear({D}, {D})" for i in range(4)},
    **{f"n{i}": "nn.LayerNorm({D})" for i in range(2)},
}

SHARED = (
    "",
    "",
    "",
    "self.l1.weight = self.l0.weight",
    "self.l1.weight = nn.Parameter(self.l0.weight.detach())",
    "self.l1.weight = nn.Parameter(self.l0.weight.detach().t())",
    "both = torch.randn(2 * {D}, {D}) / 4\n"
    "self.l0.weight, self.l1.weight = (nn.Parameter(w) for w in both.chunk(2))",
)


@dataclass(frozen=True, repr=False)
class Program:
    """Source text of a class Model, whose forward takes x and y, and how to call it."""

    source: str
    size: tuple[int, int, int]
    mode: str
    magnitude: float
    quantize: bool

    def __repr__(self) -> str:
        return (
            f"\n{self.source}\n# x, y: {self.magnitude} * torch.randn{self.size}, under "
            f"torch.{self.mode}(), quantize={self.quantize}\n"
        )

    def build(self) -> nn.Module:
        names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        exec(compile(self.source, "<program>", "exec"), names)
        torch.manual_seed(0)
        model: nn.Module = names["Model"]().eval()
        return model

    def inputs(self) -> list[Tensor]:
        made = torch.Generator().manual_seed(1)
        return [self.magnitude * torch.randn(self.size, generator=made) for _ in range(2)]


def write(choose: Choose) -> Program:
    """One program. `choose(options)` makes every decision."""
    B, S, D = choose((1, 2, 3)), choose((2, 5, 1)), choose((16, 8, 12))
    sizes = {"B": B, "S": S, "D": D, "BS": B * S, "SD": S * D, "BD": B * D}
    values, body = ["x", "y"], list[str]()
    for n in range(choose((2, 3, 4, 1))):
        line = choose(LINES[choose(tuple(LINES))])
        new = {letter: f"{letter}{n}" for letter in "opqct"}
        used = {"a": choose(values[::-1]), "b": choose(values)}
        numbers = {"i": choose((0, 1, 2, 3)), "j": choose((1, 2, 3, 0)), "k": choose((0, 1))}
        if "{act}" in line:
            used["act"] = choose(ACTIVATIONS).format(t=new["p"])
        body += line.format(**sizes, **new, **used, **numbers).split("\n")
        values += [new[letter] for letter in "qpo" if f"{{{letter}}}" in line and letter != "p"]
        values += [new["p"]] if "{p}, " in line and "odd" not in line else []
    returned = [choose(RETURNS) for _ in range(choose((1, 2, 3)))]
    last = [r.format(a=choose(values[::-1]), **sizes) for r in ["{a}", *returned]]
    body.append(f"return {', '.join(last)}")
    shared = choose(SHARED).format(**sizes)
    text = "\n".join(body)
    read = set(re.findall(r"self\.(\w+)", f"{text}\n{shared}"))
    parts = [
        f"self.{name} = {made.format(**sizes)}" for name, made in PARTS.items() if name in read
    ]
    init = ["super().__init__()", *parts, *shared.split("\n")]
    imports = "from torch.nn.attention import SDPBackend, sdpa_kernel\n\n" * ("sdpa_k" in text)
    source = f"{imports}class Model(nn.Module):\n    def __init__(self):\n"
    source += "".join(f"        {line}\n" for line in init if line)
    source += "\n    def forward(self, x, y):\n" + "".join(f"        {line}\n" for line in body)
    return Program(
        source, (B, S, D), choose(MODES), choose((1.0, 8.0)), choose((True, True, False))
    )


programs = st.composite(lambda draw: write(lambda options: draw(st.sampled_from(options))))()
