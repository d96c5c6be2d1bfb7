"""Inductor's caches on disk: what one graphquant compiled, no other one finds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache

from graphquant.lowering import inner
from tests.small import Mlp, seeded


def _compiles() -> Counter[str]:
    """How often Inductor found compiled code, and did not, in one new compilation."""
    torch._dynamo.reset()
    before = Counter(counters["inductor"])
    with torch.inference_mode():
        torch.compile(seeded(Mlp), backend="graphquant")(torch.ones(4, 64))
    return Counter(counters["inductor"]) - before


def test_compiled_code_is_found_again_by_the_same_graphquant_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fresh_inductor_cache():
        assert _compiles()["fxgraph_cache_miss"] == 1
        assert _compiles()["fxgraph_cache_hit"] == 1
        monkeypatch.setattr(inner, "version", lambda: "another graphquant")
        assert _compiles()["fxgraph_cache_miss"] == 1
        assert _compiles()["fxgraph_cache_hit"] == 1


def test_a_cache_key_of_the_users_counts_too_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_inductor_cache():
        _compiles()
        with torch.compiler.config.patch(cache_key_tag="theirs"):
            assert _compiles()["fxgraph_cache_miss"] == 1
            assert torch.compiler.config.cache_key_tag == "theirs"
        assert _compiles()["fxgraph_cache_hit"] == 1
