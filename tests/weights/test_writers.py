"""Adapters of PEFT that are not merged: the weights that they compute are packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphquant import Report

peft = pytest.importorskip("peft")

CONFIGS: dict[str, Any] = {
    "lora": lambda **k: peft.LoraConfig(r=4, init_lora_weights=False, **k),
    "loha": lambda **k: peft.LoHaConfig(r=4, init_weights=False, **k),
    "lokr": lambda **k: peft.LoKrConfig(r=4, init_weights=False, **k),
    "hra": lambda **k: peft.HRAConfig(r=4, init_weights=False, **k),
    "hra, orthogonal": lambda **k: peft.HRAConfig(r=4, init_weights=False, apply_GS=True, **k),
    "oft": lambda **k: peft.OFTConfig(r=0, oft_block_size=8, init_weights=False, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=["up"], init_ia3_weights=False, **k),
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_of_an_unmerged_adapter_is_int8(name: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = peft.get_peft_model(Mlp(), CONFIGS[name](target_modules=["up", "down"])).eval()
    x, reports = torch.randn(2, 5, 32), list[Report]()
    options = {"inner": "eager", "on_report": reports.append}
    run = torch.compile(net, backend="graphquant", options=options)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                run(x), net(x), rtol=0, atol=0.03 * float(net(x).abs().max())
            )
        for p in net.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(run(x), net(x), rtol=0, atol=0.03 * float(net(x).abs().max()))
    linears = Report.merge(reports).linears
    assert len(linears) >= 2 and all(o.int8 for o in linears)
