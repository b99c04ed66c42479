"""What routers of a mixture of experts chose is counted as they chose it, in the steps that every rank samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import insitu
from insitu.rules.sampling import hash64, is_sampled
from insitu.testing import Recording

RUN = "0123456789abcdef"
EXPERTS, TOP_K, LAYERS = 6, 2, 2
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": TOP_K,
}


def mixtral() -> nn.Module:
    model: nn.Module = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=EXPERTS))
    return model.eval()


def qwen() -> nn.Module:
    config = Qwen3MoeConfig(**SHAPE, num_experts=EXPERTS, moe_intermediate_size=24, head_dim=8, decoder_sparse_step=1)
    model: nn.Module = Qwen3MoeForCausalLM(config)
    return model.eval()


class Chosen:
    """Counts what each router returns, by a hook of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[tuple[int, int], Counter[int]] = {}
        self.step = -1
        for layer, module in enumerate(module for _, module in model.named_modules() if hasattr(module, "top_k")):
            if hasattr(module, "weight"):
                module.register_forward_hook(lambda _m, _i, out, layer=layer: self._take(layer, out[-1]))

    def _take(self, layer: int, chosen: torch.Tensor) -> None:
        self.counts.setdefault((self.step, layer), Counter()).update(chosen.reshape(-1).tolist())


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_loads_are_what_the_routers_returned(
    make: Callable[[], nn.Module], insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)
    torch.manual_seed(1)
    model = make()
    chosen = Chosen(model)
    with insitu.attach(model, to=insitu_records) as session, torch.inference_mode():
        assert [site.name for site in session.sites() if site.num_experts] == ["L0.router_logits", "L1.router_logits"]
        for step in range(96):
            chosen.step = step
            with session.step(step):
                model(torch.randint(32, (1 + step % 3, 4)))
    found = insitu_records.rows("expert_loads")
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    sampled = {step for step in range(96) if is_sampled(RUN, step, 16)}
    assert sampled and {row["step_id"] for row in found} == sampled
    routers = sorted({layer for _, layer in chosen.counts})
    for row in found:
        layer = routers[int(names[row["site"]][1])]
        counts = chosen.counts[row["step_id"], layer]
        assert row["load"] == [counts[expert] for expert in range(EXPERTS)]
        assert row["num_rows"] == 4 * (1 + row["step_id"] % 3) == sum(row["load"]) / TOP_K


def test_padding_is_not_counted(insitu_records: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)
    step = next(step for step in range(100) if is_sampled(RUN, step, 16))
    model = mixtral()
    with insitu.attach(model, to=insitu_records) as session, torch.inference_mode():
        model(torch.zeros(1, 8, dtype=torch.int64))
        with session.step(step, num_rows=5, num_padded=3):
            model(torch.randint(32, (1, 8)))
    for row in insitu_records.rows("expert_loads"):
        if row["step_id"] == step:
            assert (row["num_rows"], sum(row["load"])) == (5, 5 * TOP_K)


class LogitsAlone(nn.Module):
    """Looks like a router, and returns no choice."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = EXPERTS, TOP_K
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"gate": LogitsAlone()})
        self.out = nn.Linear(EXPERTS, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.mlp["gate"](x))
        return found


def test_what_only_looks_like_a_router_disturbs_no_other_site(insitu_records: Recording) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model()
    with insitu.attach(model, to=insitu_records) as session, torch.inference_mode():
        for _ in range(40):
            model(torch.randn(3, 16))
        assert session.flush().dropped == 0
        assert {"L0.resid_post", "L1.resid_post"}.isdisjoint(session.coverage().never_fired)
    assert len({row["step_id"] for row in insitu_records.rows("summaries")}) == 40
    assert insitu_records.rows("expert_loads") == []


def test_outputs_are_the_same_bits(insitu_records: Recording) -> None:
    torch.manual_seed(3)
    model = mixtral()
    ids = torch.randint(32, (2, 5))
    with torch.inference_mode():
        bare = model(ids).logits
        with insitu.attach(model, to=insitu_records):
            assert all(torch.equal(model(ids).logits, bare) for _ in range(40))


def test_a_dense_model_has_no_routers_and_no_rows(insitu_records: Recording) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with insitu.attach(net, to=insitu_records) as session, torch.inference_mode():
        for _ in range(64):
            net(torch.ones(1, 4))
        assert not any(site.num_experts for site in session.sites())
    assert insitu_records.rows("expert_loads") == []


@given(run=st.integers(0, 2**64 - 1), every=st.sampled_from([2, 16]), slots=st.integers(1, 4))
def test_every_slot_of_a_pipeline_is_sampled_alike(run: int, every: int, slots: int) -> None:
    name = f"{run:016x}"
    hits = [sum(is_sampled(name, step, every) for step in range(slot, 4096, slots)) for slot in range(slots)]
    expected = 4096 / slots / every
    assert all(abs(num - expected) < 7 * expected**0.5 for num in hits)


def test_the_hash_is_the_one_every_rank_has() -> None:
    assert [hash64(RUN, step) for step in (0, 1)] == [hash64(RUN.upper(), step) for step in (0, 1)]
    assert hash64("0" * 16, 0) == 0xE220A8397B1DCDAF  # splitmix64 of seed 0, as published
