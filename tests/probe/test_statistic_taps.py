"""Statistics are taken of the sites a rule names, in the steps that every rank samples, and in no other."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from value_kit import assert_told

import insitu
from insitu.records import schema_of
from insitu.rules.rule import RuleError
from insitu.rules.sampling import is_sampled
from insitu.sites.site import Site
from insitu.slabs.statistics import periods
from insitu.statistics.columns import partials_of
from insitu.statistics.parts import finalise
from insitu.testing import Recording

RUN = "0123456789abcdef"
STEPS = 40


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")  # however long these steps take, none is left out


def llama(vocab_size: int = 48) -> nn.Module:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def summary(sites: str = "*", **fields: Any) -> insitu.Rule:
    return insitu.Rule(sites=sites, take="summary", **fields)


def told(recording: Recording) -> dict[tuple[int, str], dict[str, Any]]:
    """Return what the table says, by step and site."""
    rows = recording.table("statistics")
    names = {row["site"]: row["name"] for row in recording.rows("sites")}
    found = finalise(partials_of(rows))
    keys = zip(rows["step_id"].to_pylist(), rows["site"].to_pylist(), strict=True)
    return {
        (step, names[site]): {name: values[at].tolist() for name, values in found.items()}
        for at, (step, site) in enumerate(keys)
    }


class Seen:
    """Keeps what modules return and layers read, by hooks of its own."""

    def __init__(self, model: nn.Module, paths: dict[str, str]) -> None:
        self.step = -1
        self.values: dict[tuple[int, str], torch.Tensor] = {}
        self.sources: dict[tuple[int, str], torch.Tensor] = {}
        modules = dict(model.named_modules())
        for name, path in paths.items():
            modules[path].register_forward_hook(lambda _m, args, out, name=name: self._keep(name, args, out))

    def _keep(self, name: str, args: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        self.values[self.step, name] = x.reshape(-1, x.shape[-1]).clone()
        if args:
            self.sources[self.step, name] = args[0].reshape(-1, args[0].shape[-1]).clone()


PATHS = {
    "embed": "model.embed_tokens",
    "L0.attn_out": "model.layers.0.self_attn",
    "L0.resid_post": "model.layers.0",
    "L1.mlp_out": "model.layers.1.mlp",
    "L1.resid_post": "model.layers.1",
    "logits": "lm_head",
}


def test_sampled_steps_tell_the_sites_of_the_rule(insitu_records: Recording) -> None:
    model = llama()
    seen = Seen(model, PATHS)
    with insitu.attach(model, to=insitu_records, rules=[summary(every=4)]) as session, torch.inference_mode():
        for step in range(STEPS):
            seen.step = step
            with session.step(step):
                model(torch.randint(48, (2, 1 + step % 3)))
            if step % 8 == 7:
                session.flush()
        sites = {site.name for site in session.sites()}
        assert session.flush().dropped == 0
    found = told(insitu_records)
    sampled = [step for step in range(STEPS) if is_sampled(RUN, step, 4)]
    fired = sites - {"output"}
    assert found.keys() == {(step, site) for step in sampled for site in fired} and sampled
    for (step, site), row in found.items():
        if site in PATHS:
            assert_told(row, seen.values[step, site].numpy().astype(np.float64))
            assert np.isnan(row["entropy"]) == (site != "logits")
    for step in sampled:
        assert_change(found[step, "L1.resid_post"], seen, step)
        chance = seen.values[step, "logits"].softmax(1)
        assert found[step, "logits"]["top1"] == pytest.approx(float(chance.amax(1).mean()), rel=1e-5)
    full = {row["step_id"] for row in insitu_records.rows("steps", variant=1)}
    assert full == set(sampled)


def assert_change(row: dict[str, Any], seen: Seen, step: int) -> None:
    before, after = (kept[step, "L1.resid_post"].double() for kept in (seen.sources, seen.values))
    cosine = torch.cosine_similarity(before, after, 1)
    assert row["residual_cosine"] == pytest.approx(float(cosine.mean()))
    assert row["residual_ratio"] == pytest.approx(float((after.norm(dim=1) / before.norm(dim=1)).mean()))


def steps_of(recording: Recording, site: str) -> set[int]:
    return {step for step, name in told(recording) if name == site}


def test_the_first_rule_of_its_kind_that_names_a_site_is_followed(insitu_records: Recording) -> None:
    rules = [summary("L0.*", every=2), summary("L*.resid_post", every=1), insitu.Rule(sites="L0.resid_post")]
    model = llama()
    seen = Seen(model, {"L0.resid_post": PATHS["L0.resid_post"]})
    with insitu.attach(model, to=insitu_records, rules=rules) as session, torch.inference_mode():
        for seen.step in range(STEPS):
            step = seen.step
            rows = [insitu.Rows("a", start=0, count=3, capture=step % 5 == 4)]
            with session.step(step, rows=rows):
                model(torch.randint(48, (1, 3)))
            if step % 8 == 7:
                session.flush()  # there are sixteen places, and a drain that shares its core
    every, second = set(range(STEPS)), {step for step in range(STEPS) if is_sampled(RUN, step, 2)}
    assert steps_of(insitu_records, "L1.resid_post") == every
    assert steps_of(insitu_records, "L0.resid_post") == steps_of(insitu_records, "L0.mlp_out") == second
    assert steps_of(insitu_records, "L1.mlp_out") == steps_of(insitu_records, "logits") == set()
    captured = insitu_records.rows("captures")
    assert {row["step_id"] for row in captured} == {step for step in range(STEPS) if step % 5 == 4}
    for row in captured:
        expected = seen.values[row["step_id"], "L0.resid_post"][row["row"]]
        assert np.frombuffer(row["data"], np.float32).tolist() == expected.tolist()


def test_what_a_module_is_given_and_part_of_what_it_returns_have_statistics_too(insitu_records: Recording) -> None:
    model = llama()
    seen = Seen(model, {"act": "model.layers.1.mlp.down_proj", "q": "model.layers.0.self_attn.q_proj"})
    rules = [summary("L1.mlp_act", every=1), summary("L0.q", every=1)]
    with insitu.attach(model, to=insitu_records, rules=rules) as session, torch.inference_mode():
        for seen.step in range(3):
            with session.step(seen.step):
                model(torch.randint(48, (2, 3)))
    found = told(insitu_records)
    assert found.keys() == {(step, site) for step in range(3) for site in ("L1.mlp_act", "L0.q")}
    for step in range(3):
        assert_told(found[step, "L1.mlp_act"], seen.sources[step, "act"].numpy().astype(np.float64))
        assert_told(found[step, "L0.q"], seen.values[step, "q"].numpy().astype(np.float64))


def test_padding_is_not_counted(insitu_records: Recording) -> None:
    net = nn.Sequential(nn.Identity())
    x = torch.randn(6, 8)
    x[4:] = float("nan")
    with insitu.attach(net, to=insitu_records, rules=[summary(every=1)]) as session, torch.inference_mode():
        for step, valid in enumerate((4, 4, 0)):
            with session.step(step, num_rows=valid, num_padded=6 - valid):
                net(x.clone())
    found = told(insitu_records)
    for step in (0, 1):
        assert_told(found[step, "output"], x[:4].numpy().astype(np.float64))
    assert_told(found[2, "output"], np.zeros((0, 8)))


def test_what_a_sampled_step_poisoned_is_counted_and_the_rest_stays_readable(insitu_records: Recording) -> None:
    net = nn.Sequential(nn.ReLU())
    x = torch.randn(5, 8)
    x[3, 2], x[4, 0] = float("nan"), float("inf")
    with insitu.attach(net, to=insitu_records, rules=[summary(every=1)]), torch.inference_mode():
        net(torch.randn(5, 8))
        net(x)
    assert_told(told(insitu_records)[1, "0"], torch.relu(x).numpy().astype(np.float64))


def test_outputs_are_the_same_bits_with_grad_and_without(insitu_records: Recording) -> None:
    model, ids = llama(), torch.arange(6)[None]
    bare = model(ids).logits
    with insitu.attach(model, to=insitu_records, rules=[summary(every=1)]):
        observed = model(ids).logits
        observed.sum().backward()
        assert torch.equal(observed, bare)
    assert all(p.grad is not None for p in model.parameters())
    assert told(insitu_records)


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_that_overwrites_what_it_read_tells_no_change(insitu_records: Recording) -> None:
    model = Stack(InPlace(), nn.Linear(4, 4), nn.Linear(4, 6))
    with insitu.attach(model, to=insitu_records, rules=[summary(every=1)]), torch.inference_mode():
        model(torch.randn(3, 4))
    found = told(insitu_records)
    assert np.isnan(found[0, "L0.resid_post"]["residual_ratio"]), "it shares memory with its input"
    assert found[0, "L1.resid_post"]["residual_ratio"] > 0
    assert np.isnan(found[0, "L2.resid_post"]["residual_ratio"]), "its input has another width"


class Imaginary(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.complex(x, x)


def test_a_site_without_statistics_is_said_once_and_disturbs_no_other(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(nn.ReLU(), Imaginary())
    with insitu.attach(net, to=insitu_records, rules=[summary(every=1)]) as session, torch.inference_mode():
        with caplog.at_level(logging.WARNING, "insitu"):
            for _ in range(8):
                net(torch.randn(2, 3))
        assert session.coverage().never_fired == []
    assert sum("no statistics of 1 (" in record.message for record in caplog.records) == 1
    assert {site for _, site in told(insitu_records)} == {"0"}
    assert len(told(insitu_records)) == 8


def test_what_cannot_be_measured_together_is_said_and_not_tried_again(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.ReLU(), nn.ReLU())
    with insitu.attach(net, to=insitu_records, rules=[summary(every=1)]), torch.inference_mode():
        net(torch.randn(2, 3))
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "insitu"):
            patched.setattr("insitu.statistics.reductions.cast_errors", no_memory)
            for _ in range(3):
                net(torch.randn(2, 3))
        net(torch.randn(2, 3))
    said = [record.message.split(" (")[0] for record in caplog.records]
    assert said == [f"insitu: no statistics of {site}" for site in ("0", "1", "output")]
    assert {step for step, _ in told(insitu_records)} == {0}


def no_memory(*_: Any) -> Any:
    raise RuntimeError("out of memory")


def test_large_and_small_tensors_of_many_widths_are_all_told(insitu_records: Recording) -> None:
    widths = [3, 200, 3, *range(4, 30), 200, 40_000]
    layers = [nn.Linear(a, b) for a, b in zip([8, *widths], widths, strict=False)]
    net = nn.Sequential(*layers)
    seen = Seen(net, {str(at): str(at) for at in range(len(layers))})
    with insitu.attach(net, to=insitu_records, rules=[summary(every=1)]), torch.inference_mode():
        for seen.step in range(3):
            net(torch.randn(1 + 80 * (seen.step == 1), 8))
    found = told(insitu_records)
    assert len(found) == 3 * (len(layers) + 1)
    for key, values in seen.values.items():
        assert_told(found[key], values.numpy().astype(np.float64))


class FirstRow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1]


def test_sites_of_one_width_and_other_rows_or_another_kind_are_kept_apart(insitu_records: Recording) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), FirstRow(), nn.Linear(8, 8))
    seen = Seen(net, {str(at): str(at) for at in range(4)})
    with insitu.attach(net, to=insitu_records, rules=[summary(every=1)]), torch.inference_mode():
        for seen.step in range(3):
            net(torch.randn(5, 8))
    found = told(insitu_records)
    for key, values in seen.values.items():
        assert_told(found[key], values.numpy().astype(np.float64))
    recording, model = Recording(), llama(vocab_size=16)  # as many ids as the residual stream is wide
    with insitu.attach(model, to=recording, rules=[summary(every=1)]), torch.inference_mode():
        model(torch.arange(6)[None])
    entropy = {site: row["entropy"] for (_, site), row in told(recording).items()}
    assert {site for site, value in entropy.items() if not np.isnan(value)} == {"logits"}


def test_scores_of_routers_are_told_as_those_of_tokens(insitu_records: Recording) -> None:
    torch.manual_seed(2)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=6,
    )
    model = MixtralForCausalLM(config).eval()
    kept: list[torch.Tensor] = []
    gate = dict(model.named_modules())["model.layers.1.mlp.gate"]
    gate.register_forward_hook(lambda _m, _i, output: kept.append(output[0].clone()))
    session = insitu.attach(model, to=insitu_records, rules=[summary(every=1)])
    with session, torch.inference_mode(), session.step(5):
        model(torch.randint(32, (2, 4)))
    row = told(insitu_records)[5, "L1.router_logits"]
    chance = kept[0].double().softmax(1)
    assert row["entropy"] == pytest.approx(float(-(chance * chance.log()).sum(1).mean()), rel=1e-5)
    assert row["z_loss"] == pytest.approx(float(kept[0].double().logsumexp(1).square().mean()), rel=1e-5)
    assert np.isnan(told(insitu_records)[5, "L1.mlp_out"]["entropy"])


def test_ranks_that_hold_a_site_whole_have_one_checksum_and_one_bit_changes_it(insitu_records: Recording) -> None:
    model, ids = llama(), torch.arange(6)[None]
    other = copy.deepcopy(model)
    with torch.no_grad():
        bits = other.get_parameter("lm_head.weight").view(torch.int32)
        bits[7, 3] ^= 1 << 20
    found = []
    for each in (model, copy.deepcopy(model), other):
        recording = Recording()
        with insitu.attach(each, to=recording, rules=[summary(every=1)]), torch.inference_mode():
            each(ids)
        names = {row["site"]: row["name"] for row in recording.rows("sites")}
        found.append({names[row["site"]]: row["checksum"] for row in recording.rows("statistics")})
    assert found[0] == found[1]
    whole = {name for name, value in found[0].items() if value is not None}
    assert whole == {"L1.resid_post", "logits"}
    assert found[0]["L1.resid_post"] == found[2]["L1.resid_post"] and found[0]["logits"] != found[2]["logits"]


def test_steps_that_find_no_place_are_counted(insitu_records: Recording) -> None:
    net = nn.Sequential(nn.ReLU())
    with insitu.attach(net, to=insitu_records, rules=[summary(every=1)]) as session, torch.inference_mode():
        observer = session._observer
        assert observer is not None and observer.statistic_slabs is not None
        while observer.statistic_slabs.ring.take() is not None:
            pass
        for _ in range(3):
            net(torch.ones(1, 2))
        session.flush()
        observer.statistic_slabs.ring.free(16)
        net(torch.ones(1, 2))
    assert session.stats().dropped["statistics"] == {"slab_full": 2 * 3}
    assert steps_of(insitu_records, "output") == {3}
    assert session.stats().produced["statistics"] == 2 * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"take": "summary", "every": 0}, "every=0"),
        ({"take": "summary", "rows": "last"}, "all valid rows"),
        ({"take": "summary", "requests": "all"}, "all valid rows"),
        ({"take": "rows", "every": 4}, 'for take="summary"'),
    ],
)
def test_a_summary_that_cannot_be_followed_says_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        insitu.Rule(sites="*", **fields)


def test_without_a_rule_there_is_no_row_and_no_memory(insitu_records: Recording) -> None:
    with insitu.attach(llama(), to=insitu_records) as session:
        observer = session._observer
        assert observer is not None and observer.statistic_slabs is None
    assert insitu_records.table("statistics").equals(schema_of("statistics").empty_table())


def test_a_store_tells_them_by_site_and_by_step(tmp_path: Path) -> None:
    from insitu_collector.store import open_store

    model = llama()
    with insitu.attach(model, to=f"file://{tmp_path}", rules=[summary(every=4)]) as session, torch.inference_mode():
        for step in range(STEPS):
            with session.step(step):
                model(torch.randint(48, (2, 3)))
    store = open_store(tmp_path)
    by_site = store.statistics().to_pylist()
    sampled = sum(is_sampled(RUN, step, 4) for step in range(STEPS))
    assert [row["site"] for row in by_site][:2] == ["embed", "L0.attn_out"]
    assert all(row["num_parts"] == sampled and row["num_rows"] == 6 * sampled for row in by_site)
    by_step = store.statistics(by_step=True).to_pylist()
    assert len(by_step) == sampled * len(by_site)
    first = [row for row in by_step if row["site"] == "logits"]
    assert by_site[-1]["absmax"] == max(row["absmax"] for row in first)
    assert by_site[-1]["mean"] == pytest.approx(np.mean([row["mean"] for row in first]))


def test_what_one_rank_holds_before_the_all_reduce_is_not_summarised() -> None:
    sites = [Site(0, "L0.mlp_out", "a", shard="partial"), Site(1, "L0.resid_post", "b"), Site(2, "logits", "c")]
    rules = [insitu.Rule(sites="*"), summary("L*", every=4), summary()]
    assert periods(sites, rules) == {4: (sites[1],), 16: (sites[2],)}
