"""Statistics of other packages are taken where and when a rule says, and their errors harm nobody else."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from package_kit import install
from torch import nn

import insitu
from insitu.overhead.governor import State
from insitu.plugins.discovery import STATISTICS
from insitu.rules.rule import RuleError
from insitu.rules.sampling import is_sampled
from insitu.session.step import StepRecord
from insitu.sites.site import Site
from insitu.statistics.plugged import wanted_of
from insitu.testing import Recording, expect

RUN = "0123456789abcdef"
STEPS = 24
CODE = """
import torch
from insitu.statistic_plugins import Statistic

class Total(Statistic):
    fields = ("num_rows", "total")

    def compute(self, x):
        return torch.stack([torch.full((), len(x), dtype=torch.float64), x.double().sum()])

class Largest(Statistic):
    fields = ("largest",)

    def compute(self, x):
        return x.double().amax().reshape(1)

class Late(Statistic):
    fields = ("total",)
    num_calls = 0

    def compute(self, x):
        type(self).num_calls += 1
        if len(x) == 3:
            raise ZeroDivisionError("by its own fault")
        return x.double().sum().reshape(1)

class Early(Late):
    def compute(self, x):
        raise OSError("no licence")

class Wide(Late):
    def compute(self, x):
        return x.double().sum()

class Writes(Late):
    def compute(self, x):
        return x.abs_().double().sum().reshape(1)
"""
NAMES = ("total", "largest", "late", "early", "wide", "writes")


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")  # however long these steps take, none is left out
    entries = {f"acme.{name}": f"acme_taps:{name.capitalize()}" for name in NAMES}
    install(tmp_path, monkeypatch, "acme_taps", {STATISTICS: entries}, CODE)
    monkeypatch.delitem(sys.modules, "acme_taps", raising=False)


def rule(name: str, sites: str = "*", **fields: Any) -> insitu.Rule:
    return insitu.Rule(sites=sites, take=f"acme.{name}", **fields)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU()).eval()


def told(records: Recording) -> dict[tuple[int, str, str], dict[str, float]]:
    """Return what the table says, by step, site and statistic."""
    names = {row["site"]: row["name"] for row in records.rows("sites")}
    return {
        (row["step_id"], names[row["site"]], row["statistic"]): {v["field"]: v["value"] for v in row["values"]}
        for row in records.rows("plugin_statistics")
    }


def run(session: insitu.Session, model: nn.Module, num_rows: int = 2, steps: int = STEPS) -> list[torch.Tensor]:
    """Run steps 0, 1, ... and return what the model returned."""
    outputs = []
    for step in range(steps):
        torch.manual_seed(step)
        with session.step(step), torch.inference_mode():
            outputs.append(model(torch.randn(num_rows, 4)))
        if step % 8 == 7:  # a drain that a busy machine keeps waiting would leave steps without a place
            session.flush()
    return outputs


def test_sampled_steps_tell_what_was_asked_of_the_sites_of_the_rule(insitu_records: Recording) -> None:
    model = net()
    rules = [rule("total", "1", every=1), rule("total", every=4), rule("largest", "0", every=2)]
    with insitu.attach(model, to=insitu_records, rules=rules) as session:
        outputs = run(session, model)
        assert session.flush().dropped == 0
    found = told(insitu_records)
    later = range(1, STEPS)  # each is tried after the first step, on tensors of ours
    fourth = {(step, site, "acme.total") for step in later if is_sampled(RUN, step, 4) for site in ("0", "output")}
    second = {(step, "0", "acme.largest") for step in later if is_sampled(RUN, step, 2)}
    assert found.keys() == {(step, "1", "acme.total") for step in later} | fourth | second
    assert fourth and second
    for step in later:
        expected = {"num_rows": 2.0, "total": pytest.approx(float(outputs[step].double().sum()))}
        assert found[step, "1", "acme.total"] == expected
    assert insitu_records.table("statistics").num_rows == 0
    expect(insitu_records).every_row_once()


def test_it_sees_the_valid_rows_and_none_of_a_step_without_any(insitu_records: Recording) -> None:
    model = nn.Sequential(nn.Identity())
    x = torch.ones(5, 4)
    x[3:] = torch.nan
    with insitu.attach(model, to=insitu_records, rules=[rule("total", "0", every=1)]) as session:
        for step, valid in enumerate((3, 3, 0, 1)):
            with session.step(step, num_rows=valid, num_padded=5 - valid), torch.inference_mode():
                model(x.clone())
    assert told(insitu_records) == {
        (1, "0", "acme.total"): {"num_rows": 3.0, "total": 12.0},
        (3, "0", "acme.total"): {"num_rows": 1.0, "total": 4.0},
    }


def test_outputs_are_the_same_bits_with_grad_and_without(insitu_records: Recording) -> None:
    model, x = net(), torch.randn(3, 4)
    bare = model(x)
    with insitu.attach(model, to=insitu_records, rules=[rule("total", every=1), rule("largest", every=1)]):
        for _ in range(3):
            observed = model(x)
        assert torch.equal(observed, bare)
        observed.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.usefixtures("insitu_contains")
def test_one_that_raises_in_a_step_is_off_from_then_on_and_all_else_goes_on(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    expected = run(insitu.off(), model, 3)
    rules = [rule("late", every=1), rule("total", every=1), insitu.Rule(sites="*", take="summary", every=1)]
    with caplog.at_level(logging.WARNING, "insitu"), insitu.attach(model, to=insitu_records, rules=rules) as session:
        outputs = run(session, model, 3)
        assert session.coverage().never_fired == []
    assert all(map(torch.equal, outputs, expected))
    assert {name for _, _, name in told(insitu_records)} == {"acme.total"}
    assert insitu_records.table("statistics").num_rows == STEPS * 3
    said = [record.getMessage() for record in caplog.records if "acme.late" in record.getMessage()]
    assert len(said) == 1 and "switched off; everything else goes on (ZeroDivisionError: by its own fault)" in said[0]
    text = expect(insitu_records).row("events", kind="plugin_failed")["text"]
    assert text.startswith("the statistic acme.late (acme_taps 1.0) failed at 0 and is switched off: ZeroDivisionError")


@pytest.mark.usefixtures("insitu_contains")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("early", "OSError: no licence"),
        ("wide", "compute gave [], not the 1 numbers of its fields"),
        ("writes", "compute changed the tensor it was given"),
    ],
)
def test_one_that_fails_when_it_is_tried_gets_into_no_step(name: str, why: str, insitu_records: Recording) -> None:
    model = net()
    expected = run(insitu.off(), model)
    with insitu.attach(model, to=insitu_records, rules=[rule(name, every=1)]) as session:
        outputs = run(session, model)
    assert all(map(torch.equal, outputs, expected))
    assert told(insitu_records) == {}
    assert why in expect(insitu_records).row("events", kind="plugin_failed")["text"]


@pytest.mark.parametrize(("name", "num_rows"), [("late", 3), ("early", 2)])
def test_under_pytest_its_error_is_raised_at_the_end_of_the_step(
    name: str, num_rows: int, insitu_records: Recording
) -> None:
    model = net()
    raises = pytest.raises((ZeroDivisionError, OSError), match=r"fault|licence")
    with insitu.attach(model, to=insitu_records, rules=[rule(name, every=1)]) as session, raises:
        run(session, model, num_rows)


def test_steps_that_find_no_place_are_counted(insitu_records: Recording) -> None:
    model = net()
    with insitu.attach(model, to=insitu_records, rules=[rule("total", every=1)]) as session:
        run(session, model, steps=1)
        observer = session._observer
        assert observer is not None and observer.plugged is not None
        while observer.plugged.ring.take() is not None:
            pass
        run(session, model, steps=2)
        session.flush()
        observer.plugged.ring.free(16)
        run(session, model, steps=1)
    stats = session.stats()
    assert stats.dropped["plugin_statistics"] == {"slab_full": 2 * 3}
    assert stats.produced["plugin_statistics"] == 3 * 3
    expect(insitu_records).account_of(stats)


def test_each_part_says_for_how_many_steps_it_speaks(insitu_records: Recording) -> None:
    model, rules = net(), [rule("total", "1", every=1), rule("total", every=4), rule("largest", "0", every=2)]
    with insitu.attach(model, to=insitu_records, rules=rules) as session:
        run(session, model)
        sites = {site.name: site.number for site in session.sites()}
    rows = insitu_records.rows("sampling", take="acme.total")
    fourth = {step for step in range(1, STEPS) if is_sampled(RUN, step, 4)}
    assert {(row["step_id"], row["period"]) for row in rows if row["every"] == 4} == {(step, 4) for step in fourth}
    assert {row["step_id"] for row in rows if row["every"] == 1} == set(range(1, STEPS))
    assert {tuple(row["sites"]) for row in rows if row["every"] == 4} == {(sites["0"], sites["output"])}
    assert {row["every"] for row in insitu_records.rows("sampling", take="acme.largest")} == {2}


def test_the_governor_knows_what_they_cost_and_takes_them_less_often(
    insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    with insitu.attach(model, to=insitu_records, rules=[rule("total", every=2)]) as session:
        run(session, model, steps=1)
        observer = session._observer
        assert observer is not None and observer.plugged is not None
        monkeypatch.setattr(observer.overhead, "_state", State(doublings=2))
        run(session, model)
        session.flush()
        record = StepRecord(0, 0, None, 0, None, None, 0, 0)
        asked = observer.plugged.burden(record)
        record.plugged_due = [0, 1, 2]
        taken = observer.plugged.burden(record)
    assert {step for step, _, _ in told(insitu_records)} == {step for step in range(STEPS) if is_sampled(RUN, step, 8)}
    assert {(row["every"], row["period"]) for row in insitu_records.rows("sampling")} == {(2, 8)}
    assert asked.expected == taken.expected == pytest.approx(taken.governed / 2)
    assert taken.governed > 0 == asked.governed


def test_a_statistic_nobody_has_says_so_before_the_model_is_touched(insitu_records: Recording) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"the name 'acme\.else'; installed are acme\.early"):
        insitu.attach(model, to=insitu_records, rules=[rule("else")])
    assert type(model) is nn.Sequential


@pytest.mark.parametrize("take", ["total", "Acme.total", "acme.", "acme .x"])
def test_a_name_without_a_namespace_is_refused(take: str) -> None:
    with pytest.raises(RuleError, match='may be "rows", "summary" or'):
        insitu.Rule(sites="*", take=take)


def test_a_statistic_is_of_all_rows(insitu_records: Recording) -> None:
    with pytest.raises(RuleError, match="all valid rows"):
        rule("total", rows="last")
    assert rule("total").period == 16


def test_what_one_rank_holds_before_the_all_reduce_is_not_summarised() -> None:
    sites = [Site(0, "L0.mlp_out", "a", shard="partial"), Site(1, "L0.resid_post", "b"), Site(2, "logits", "c")]
    found = wanted_of(sites, [insitu.Rule(sites="*"), rule("total", "L*", every=4), rule("total")])
    assert [(each.site.number, each.every) for each in found] == [(1, 4), (2, 16)]


def test_without_a_rule_there_is_no_memory_and_no_row(insitu_records: Recording) -> None:
    with insitu.attach(net(), to=insitu_records, rules=[insitu.Rule(sites="*", take="summary")]) as session:
        assert session._observer is not None and session._observer.plugged is None


def test_a_store_tells_them_by_site_and_by_step(tmp_path: Path) -> None:
    from insitu_collector.store import open_store

    model = net()
    rules = [rule("total", every=4), rule("largest", every=4)]
    with insitu.attach(model, to=f"file://{tmp_path / 'store'}", rules=rules) as session:
        outputs = run(session, model)
    store = open_store(tmp_path / "store")
    sampled = [step for step in range(1, STEPS) if is_sampled(RUN, step, 4)]
    by_site = {row["site"]: row for row in store.plugin_statistics("acme.total").to_pylist()}
    assert list(by_site) == ["0", "1", "output"]
    total = sum(float(outputs[step].double().sum()) for step in sampled)
    expected = {"site": "output", "num_parts": len(sampled), "num_rows": 2.0 * len(sampled)}
    assert by_site["output"] == expected | {"total": pytest.approx(total)}
    by_step = store.plugin_statistics("acme.largest", by_step=True).to_pylist()
    assert [row["step_id"] for row in by_step if row["site"] == "output"] == sampled
    assert np.isfinite([row["largest"] for row in by_step]).all()
