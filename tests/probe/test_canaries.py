"""With t0="boundary" only boundaries and routers have canaries, and what rules name is taken as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu.config import ConfigError
from insitu.rules.sampling import is_sampled
from insitu.testing import Recording, oracle_model

RUN = "0123456789abcdef"
STEPS = 40


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)


def names(records: Recording) -> dict[int, str]:
    return {row["site"]: row["name"] for row in records.rows("sites")}


def play(records: Recording, t0: str, rules: list[insitu.Rule], poison: int = -1) -> Any:
    """Run the oracle model; the input of step `poison` is NaN. Return coverage."""
    net = oracle_model()
    with insitu.attach(net, to=records, rules=rules, t0=t0, overhead_budget=1.0) as session, torch.inference_mode():
        for step in range(STEPS):
            with session.step(step):
                net(torch.full((3, 4), float("nan") if step == poison else 1.0))
        return session.coverage()


def test_only_boundaries_are_tapped_where_no_rule_names_more() -> None:
    whole, boundary = Recording(), Recording()
    play(whole, "all", [])
    play(boundary, "boundary", [])
    sites = whole.rows("sites")
    told = {row["site"] for row in whole.rows("summaries")}
    assert {names(whole)[site] for site in told} == set(names(boundary).values())
    assert len(boundary.rows("sites")) < len(sites)
    columns = ("step_id", "num_rows", "canary", "row_sum", "absmax")
    assert [[row[name] for name in columns] for row in boundary.rows("summaries")] == [
        [row[name] for name in columns] for row in whole.rows("summaries")
    ]


def test_a_step_that_is_not_finite_is_told_at_the_boundary() -> None:
    whole, boundary = Recording(), Recording()
    play(whole, "all", [], poison=7)
    play(boundary, "boundary", [], poison=7)
    inside = {names(whole)[row["site"]] for row in whole.rows("summaries", step_id=7)}
    at_end = boundary.rows("summaries", step_id=7)
    assert {names(boundary)[row["site"]] for row in at_end} < inside
    assert all(row["nonfinite_rows"] == [0, 1, 2] for row in at_end)


def test_statistics_and_rows_are_taken_of_sites_without_a_canary() -> None:
    records = Recording()
    rules = [insitu.Rule(sites="L0.mlp_out", take="summary", every=4), insitu.Rule(sites="L1.mlp_out", requests="all")]
    coverage = play(records, "boundary", rules)
    assert coverage.never_fired == []
    sampled = [step for step in range(STEPS) if is_sampled(RUN, step, 4)]
    by_name = {name: site for site, name in names(records).items()}
    assert [row["step_id"] for row in records.rows("statistics", site=by_name["L0.mlp_out"])] == sampled
    captured = {row["step_id"] for row in records.rows("captures", site=by_name["L1.mlp_out"])}
    assert captured == set(range(1, STEPS)), "widths are known after the first step"
    assert records.rows("events", kind="site_never_fired") == []


def test_a_quiet_step_runs_no_reduction_inside_a_stage() -> None:
    net = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    rule = insitu.Rule(sites="0", take="summary", every=1 << 30)
    with insitu.attach(net, to="memory://", rules=[rule], t0="boundary") as session, torch.inference_mode():
        net(torch.ones(2, 3))
        inner = session.sites()[0]
        assert (inner.name, inner.boundary) == ("0", False)
        observer = session._observer
        assert observer is not None
        canary = observer.slabs.views[1].canary[inner.number]
        canary.fill_(123.0)
        net(torch.ones(2, 3))
        assert canary.item() == 123.0, "nobody wrote it"


def test_a_tier_that_is_none_is_one_line_at_attach() -> None:
    with pytest.raises(ConfigError, match=r'^t0: .none. is not known; it may be "all" or "boundary"'):
        insitu.attach(nn.Linear(2, 2), to="memory://", t0="none")
