"""Verdict `expert_imbalance`: told of a router that sends nearly everything one way, and of no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_kit import table
from transformers import MixtralConfig, MixtralForCausalLM

import insitu
from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.judge.runs import judged
from insitu_collector.store import open_store
from insitu_collector.verdicts import expert_imbalance

SECOND = 1_000_000_000


def evidence(loads: list[list[int]], num_rows: int) -> Evidence:
    """Return the evidence of one router, one sampled step a second quarter."""
    found = Evidence()
    source = {"run": "ab" * 8, "role": "rank", "boot_id": "b", "replica": 0, "unix_anchor_ns": 0, "mono_anchor_ns": 0}
    found.add(
        {
            "sources": table("sources", [source]),
            "sites": table("sites", [{"site": 3, "name": "L5.router_logits", "layer": 5, "axis": "tokens"}]),
        }
    )
    for step, load in enumerate(loads):
        beat = table("health", [{"t_ns": (100 + step // 4) * SECOND}])
        row = {"step_id": 16 * step, "site": 3, "num_rows": num_rows, "load": load}
        found.add({"health": beat, "expert_loads": table("expert_loads", [row])})
    return found


def choices(seed: int, popularity: np.ndarray[Any, np.dtype[np.float64]], top_k: int, num_rows: int) -> list[int]:
    """Return how many of `num_rows` tokens chose each expert, `top_k` different ones each."""
    random = np.random.default_rng(seed)
    noise = random.gumbel(size=(num_rows, len(popularity))) + np.log(popularity)
    chosen = np.argsort(-noise, axis=1)[:, :top_k]
    return np.bincount(chosen.reshape(-1), minlength=len(popularity)).tolist()  # type: ignore[no-any-return]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_experts=st.sampled_from([4, 8, 16, 60]),
    top_k=st.integers(1, 2),
    skew=st.floats(0.0, 0.4),
)
def test_an_uneven_router_as_trained_ones_are_is_never_told(
    seed: int, num_experts: int, top_k: int, skew: float
) -> None:
    popularity = np.exp(np.random.default_rng(seed).normal(0.0, skew, num_experts))
    loads = [choices(seed * 100 + step, popularity, top_k, 256) for step in range(40)]
    assert expert_imbalance.look(evidence(loads, 256)) == []


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), num_experts=st.sampled_from([4, 8, 60]), top_k=st.integers(1, 2))
def test_a_router_that_collapsed_onto_one_expert_is_told_with_its_place(
    seed: int, num_experts: int, top_k: int
) -> None:
    hot = seed % num_experts
    popularity = np.ones(num_experts)
    popularity[hot] = 30.0 * num_experts
    loads = [choices(seed * 100 + step, popularity, top_k, 256) for step in range(40)]
    [finding] = expert_imbalance.look(evidence(loads, 256))
    assert (finding.kind, finding.on_rank, finding.layer) == (VerdictKind.EXPERT_IMBALANCE, 0, 5)
    assert f"at L5.router_logits expert {hot} is chosen by" in finding.text


def test_few_steps_few_tokens_or_a_hot_moment_say_nothing() -> None:
    hot, even = [400, 10, 10, 10], [107, 108, 107, 108]
    assert expert_imbalance.look(evidence([hot] * 12, 430)) == []
    assert expert_imbalance.look(evidence([[4, 0, 0, 0]] * 30, 4)) == []
    assert expert_imbalance.look(evidence([even] * 30 + [hot] * 10, 430)) == []
    assert len(expert_imbalance.look(evidence([hot] * 40, 430))) == 1


def test_it_is_over_when_the_load_is_even_again() -> None:
    hot, even = [400, 10, 10, 10], [107, 108, 107, 108]
    assert expert_imbalance.look(evidence([hot] * 40 + [even] * 90, 430)) == []


@pytest.mark.parametrize("load", [None, [], [1]])
def test_rows_without_a_load_or_of_another_router_are_left_out(load: list[int] | None) -> None:
    found = evidence([[400, 10, 10, 10]] * 40, 430)
    row = {"step_id": -5, "site": 3, "num_rows": 430, "load": load}
    found.add({"expert_loads": table("expert_loads", [row])})
    assert len(expert_imbalance.look(found)) == 1


def test_a_real_mixture_of_experts_with_a_collapsed_router_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 8.0  # every token has this in common, ...
        for layer in model.model.layers:
            layer.mlp.gate.weight[:, 0] = 0.0  # ... to which no router listens, ...
        model.model.layers[1].mlp.gate.weight[6, 0] = 9.0  # ... but for expert 6 of layer 1
    with insitu.attach(model, to=f"file://{tmp_path}") as session, torch.inference_mode():
        for step in range(700):
            model(torch.randint(32, (1, 16)))
            if step % 50 == 49:
                session.flush()
        assert session.flush().dropped == 0
    [verdict] = [v for v in judged(open_store(tmp_path)) if v.kind == VerdictKind.EXPERT_IMBALANCE][:1]
    assert (verdict.on_rank, verdict.layer, verdict.site) == (0, 1, "L1.router_logits")
    assert "in 1 of 2 routers of rank 0" in verdict.text
    assert "expert 6 is chosen by 100 % of tokens (an even share is 25 %)" in verdict.text
