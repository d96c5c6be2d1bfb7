"""What parameters alone decide is computed when weights are packed, not at every call."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import graphquant
from graphquant.passes import constant_values
from tests.passes.graphs import Model, parameter

S, H, D = 6, 2, 16


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, S, H * D)


def compiled(net: nn.Module, **options: Any) -> Callable[..., Any]:
    options = {"inner": "eager", "select": "always", **options}
    run: Callable[..., Any] = torch.compile(
        net.eval(), backend="graphquant", fullgraph=True, options=options
    )
    return run


def ops_of(run: Callable[..., Any], *args: Any) -> set[str]:
    """The ATen ops that run at the second call."""
    run(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(*args)
    names = {e.name for e in profile.events()}
    return {n.removeprefix("aten::") for n in names if n.startswith("aten::")}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def index() -> Tensor:
    at = torch.arange(S)
    return at[:, None] - at[None] + S - 1


def swin(m: Any, x: Tensor) -> Tensor:
    bias = m.table[index().view(-1)].view(S, S, H).permute(2, 0, 1).contiguous().unsqueeze(0)
    y = F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=bias)
    return m.fc(y.transpose(1, 2).flatten(2))


def beit(m: Any, x: Tensor) -> Tensor:
    at = index()
    at[0] = 0
    at[:, 0] = 1
    bias = F.interpolate(m.table.t()[None], size=2 * S - 1, mode="linear")[0][:, at]
    y = F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=bias)
    return m.fc(y.transpose(1, 2).flatten(2))


def t5(m: Any, x: Tensor) -> Tensor:
    far = (index() - S + 1).abs()
    bucket = torch.where(far < 2, far, 2 + (far.float() / 2).log().clamp(min=0).long())
    scores = heads(x) @ heads(x).transpose(2, 3) + F.embedding(bucket, m.table).permute(2, 0, 1)
    return m.fc((scores.softmax(-1) @ heads(x)).transpose(1, 2).flatten(2))


def rotary(m: Any, x: Tensor) -> Tensor:
    angle = torch.arange(S).float()[:, None] * m.frequency[None]
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    a, b = heads(x).chunk(2, -1)
    y = heads(x) * cos + torch.cat([-b, a], -1) * sin
    return m.fc(y.transpose(1, 2).flatten(2))


def weight_norm(m: Any, x: Tensor) -> Tensor:
    w = m.direction * (m.magnitude / m.direction.norm(dim=(0, 1), keepdim=True))
    return m.fc(F.conv1d(x.transpose(1, 2), w, padding=1).transpose(1, 2))


def dora(m: Any, x: Tensor) -> Tensor:
    norm = (m.fc.weight + m.up @ m.down).norm(dim=1)
    return (m.fc(x) + F.linear(F.linear(x, m.down), m.up)) * (m.magnitude_of_rows / norm)


FORWARDS: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "swin": (swin, {"index", "arange"}),
    "beit": (beit, {"upsample_linear1d", "index", "arange"}),
    "t5": (t5, {"embedding", "log", "arange"}),
    "rotary": (rotary, {"cos", "sin", "arange"}),
    "weight norm": (weight_norm, {"linalg_vector_norm", "norm", "div"}),
    "dora": (dora, {"linalg_vector_norm", "norm"}),
}


def model(forward: Callable[..., Tensor]) -> Model:
    torch.manual_seed(0)
    return Model(
        forward,
        fc=nn.Linear(H * D, H * D),
        table=parameter(2 * S - 1, H),
        frequency=torch.rand(D // 2),
        direction=parameter(H * D, H * D, 3),
        magnitude=nn.Parameter(torch.rand(1, 1, 3)),
        magnitude_of_rows=parameter(H * D),
        up=parameter(H * D, 4),
        down=parameter(4, H * D),
    ).requires_grad_(False)


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() < 0.03 * want.norm())


@pytest.mark.parametrize("name", FORWARDS)
def test_they_are_not_computed_at_a_call(name: str, x: Tensor) -> None:
    forward, gone = FORWARDS[name]
    net = model(forward)
    assert gone & ops_of(net, x), "the model itself computes none of them"
    run = compiled(net)
    assert not gone & ops_of(run, x)
    assert near(run(x), net(x))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(net, quantize=False)(x), net(x))


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("how", ["in place", "alias", "load_state_dict", "new tensor"])
def test_they_follow_their_parameters(name: str, how: str, x: Tensor) -> None:
    net = model(FORWARDS[name][0])
    run = compiled(net, quantize=False)
    before = run(x)
    with torch.no_grad():
        new = {n: torch.rand_like(t) + 0.5 for n, t in net.state_dict().items()}
        if how == "load_state_dict":
            net.load_state_dict(new)
        for key, t in (*net.named_parameters(), *net.named_buffers()):
            if how == "in place":
                t.copy_(new[key])
            elif how == "alias":
                t.data.copy_(new[key])
            elif how == "new tensor":
                t.data = new[key]
    torch.testing.assert_close(run(x), net(x))
    assert not torch.equal(run(x), before)


def test_two_instances_have_their_own(x: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = parameter(2 * S - 1, H)
            self.fc = nn.Linear(H * D, H * D)

        def forward(self, x: Tensor) -> Tensor:
            return swin(self, x)

    nets = [Net().eval().requires_grad_(False) for _ in range(2)]
    runs = [compiled(net, quantize=False) for net in nets]
    for _ in range(2):
        for run, net in zip(runs, nets, strict=True):
            torch.testing.assert_close(run(x), net(x))


def test_what_is_returned_is_the_callers(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        cos = (m.frequency * 2).cos()
        return m.fc(x) * cos.repeat(4), cos[None]

    net = model(forward)
    run = compiled(net, quantize=False)
    for _ in range(2):
        y, cos = run(x)
        torch.testing.assert_close((y, cos), net(x))
        cos.zero_()


def test_a_gradient_flows_through_them(x: Tensor) -> None:
    net = model(swin)
    net.table.requires_grad_(True)
    with torch.enable_grad():
        run = compiled(net)
        run(x).sum().backward()
    got, net.table.grad = net.table.grad, None
    with torch.enable_grad():
        net(x).sum().backward()
    torch.testing.assert_close(got, net.table.grad)


@pytest.mark.parametrize("where", ["around", "inside", "off inside"])
def test_autocast_decides_their_dtype(where: str, x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=where != "off inside"):
            outer = m.frequency[:, None] @ m.frequency[None]  # in bfloat16 under autocast
            scale = outer.float().cos().repeat(1, 4)[0]
        return m.fc(x) * scale

    def around(m: Any, x: Tensor) -> Tensor:
        outer = m.frequency[:, None] @ m.frequency[None]
        return m.fc(x) * outer.float().cos().repeat(1, 4)[0]

    net = model(around if where == "around" else forward)
    with torch.autocast("cpu", torch.bfloat16, enabled=where != "inside"):
        want, run = net(x), compiled(net, quantize=False)
        assert ("cos" in ops_of(run, x)) == (where != "off inside")
        got = run(x)
    torch.testing.assert_close(got, want)


def test_values_that_change_are_computed_at_each_call(x: Tensor) -> None:
    def noisy(m: Any, x: Tensor) -> Tensor:
        return m.fc(x) * (m.frequency + torch.rand(D // 2)).cos().repeat(4)

    def counting(m: Any, x: Tensor) -> Tensor:
        m.frequency.add_(1)
        return m.fc(x) * m.frequency.cos().repeat(4)

    def of_input(m: Any, x: Tensor) -> Tensor:
        return m.fc(x) * (m.frequency * x.mean()).cos().repeat(4)

    for forward in (noisy, counting, of_input):
        net = model(forward)
        assert "cos" in ops_of(compiled(net, quantize=False), x)
    net, twin = model(counting), model(counting)
    run = compiled(net, quantize=False)
    for _ in range(3):
        torch.testing.assert_close(run(x), twin(x))


def test_a_size_of_the_input_is_none_of_theirs(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * m.frequency
        return m.fc(x) * angle.cos().repeat(1, 4)

    net = model(forward)
    run = torch.compile(net, backend="graphquant", dynamic=True, options={"inner": "eager"})
    for n in (6, 4, 9):
        x = torch.randn(2, n, H * D)
        assert near(run(x), net(x))


def test_of_large_values_the_smaller_ones_that_they_are_made_of_are_kept(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        bias = m.table.cos()[index()].permute(2, 0, 1)  # [H, S, S]
        bias = bias.expand(2, H, S, S).contiguous()
        y = F.scaled_dot_product_attention(heads(x), heads(x), heads(x), attn_mask=bias)
        return m.fc(y.transpose(1, 2).flatten(2))

    net = model(forward)
    assert not {"cos", "index"} & ops_of(compiled(net), x)
    torch._dynamo.reset()
    monkeypatch.setattr(constant_values, "LARGEST", 4 * H * S * S)
    run = compiled(net)
    seen = ops_of(run, x)
    assert "cos" not in seen and "index" not in seen and near(run(x), net(x))
    torch._dynamo.reset()
    monkeypatch.setattr(constant_values, "MOST", 4 * H * (2 * S - 1))  # the cosines of the table
    run = compiled(net)
    seen = ops_of(run, x)
    assert "cos" not in seen and "index" in seen and near(run(x), net(x))


def test_what_costs_nothing_takes_no_memory(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x) * (1 + m.frequency).repeat(4)
        return y + F.embedding(torch.zeros(S, dtype=torch.long), m.magnitude_of_rows[None])

    assert {"add", "embedding"} <= ops_of(compiled(model(forward)), x)


def test_a_long_chain_of_values_that_are_read_twice(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scale = m.frequency
        for _ in range(60):
            scale = (scale + scale.flip(0)).cos()
        return m.fc(x) * scale.repeat(4)

    net = model(forward)
    run = compiled(net, quantize=False)
    assert "cos" not in ops_of(run, x)
    torch.testing.assert_close(run(x), net(x))


def test_released_weights_leave_them_what_other_sizes_need() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * m.frequency
        return m.fc(x) * angle.cos().repeat(1, 4)

    net = model(forward)
    net.frequency = nn.Parameter(net.frequency, requires_grad=False)
    want = {n: net(torch.ones(2, n, H * D)) for n in (6, 4)}
    run = torch.compile(
        net, backend="graphquant", dynamic=False, options={"inner": "eager", "free_weights": True}
    )
    for n, y in want.items():
        assert near(run(torch.ones(2, n, H * D)), y)


def test_an_exported_program_has_them_as_buffers(x: Tensor) -> None:
    net = model(swin).eval()
    program = graphquant.export(net, (x,))
    (name,) = [n for n in program.state_dict if n.startswith("constants.")]
    assert program.state_dict[name].shape == (H, S, S)
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    assert near(torch.export.load(kept).module()(x), net(x))


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 64}
IMAGE = {"image_size": 32, "patch_size": 8}
ENCODERS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "beit": (
        "BeitConfig", "BeitModel",
        {**TINY, **IMAGE, "use_relative_position_bias": True},
        {"upsample_bilinear2d", "index"},
    ),
    "swin": (
        "SwinConfig", "SwinModel",
        {
            "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
            "num_heads": [2, 4], "window_size": 4,
        },
        {"index"},
    ),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {**TINY, **IMAGE}, {"cos", "sin"}),
    "mpnet": ("MPNetConfig", "MPNetModel", {**TINY, "vocab_size": 99}, {"log"}),
    "t5": (
        "T5Config", "T5EncoderModel",
        {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 99},
        {"log"},
    ),
    "modernbert": (
        "ModernBertConfig", "ModernBertModel",
        {**TINY, "vocab_size": 99, **dict.fromkeys(
            (f"{t}_token_id" for t in ("pad", "bos", "cls", "eos", "sep")), 0
        )},
        {"cos", "sin"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, device: str) -> None:
    config, cls, sizes, gone = ENCODERS[name]
    torch.manual_seed(0)
    net = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval().to(device)
    for key, table in net.named_parameters():
        if "bias_table" in key:  # zeros in the beginning
            table.normal_()
    given = {"input_ids": torch.randint(3, 99, (2, 9), device=device)}
    if "image_size" in sizes:
        given = {"pixel_values": torch.randn(2, 3, 32, 32, device=device)}
    want = net(**given)[0]

    def call(run: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: run(**given)[0]

    assert gone <= ops_of(call(net))
    run = call(compiled(net, quantize=False))
    assert not gone & ops_of(run)
    torch.testing.assert_close(run(), want)
    torch._dynamo.reset()
    got = compiled(net, inner="inductor")(**given)[0]
    assert near(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["swin", "beit", "dora"])
def test_cuda_graphs_read_what_is_packed_again(name: str, x: Tensor) -> None:
    net, x = model(FORWARDS[name][0]).cuda(), x.cuda()
    run = compiled(net, inner="inductor", mode="reduce-overhead")
    for _ in range(3):
        for _ in range(3):
            assert near(run(x), net(x))
        for t in (*net.parameters(), *net.buffers()):
            t.mul_(1.5)
