"""Under pressure a rule gives way as it says: rows dropped, in fewer steps, or replaced by statistics; all counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.exporters.base import Ack, Batch, Retry
from insitu.rules.pressure import DROP, HALF, NOBODY, ON_FULL, SAMPLE, SUMMARY, giving_way
from insitu.rules.rule import RuleError
from insitu.testing import Recording

RUN = "0123456789abcdef"
fullness = st.floats(0, 1)
steps = st.integers(0, 10**9)


@given(fullness, fullness, steps)
def test_a_fuller_queue_takes_less_of_the_same(one: float, other: float, step: int) -> None:
    emptier, fuller = sorted((one, other))
    assert giving_way(emptier, RUN, step) <= giving_way(fuller, RUN, step)


@given(fullness, steps)
def test_who_gives_way_when(full: float, step: int) -> None:
    found = giving_way(full, RUN, step)
    assert DROP not in found, "it is the queue that drops"
    assert (found == NOBODY) == (full < HALF)
    assert full < HALF or SUMMARY in found


@pytest.mark.parametrize(("full", "share"), [(0.5, 1 / 2), (0.8, 1 / 4), (0.9, 1 / 8), (1.0, 1 / 1024)])
def test_sampled_rows_thin_out_as_the_queue_fills(full: float, share: float) -> None:
    taken = sum(SAMPLE not in giving_way(full, RUN, step) for step in range(20_000))
    assert taken / 20_000 == pytest.approx(share, rel=0.25)


class Away(Recording):
    """Takes nothing while it is away."""

    is_away = True

    def export(self, batch: Batch) -> Ack:
        if self.is_away:
            raise Retry(0.0)
        return super().export(batch)

    def flush(self, timeout_s: float) -> bool:
        return not self.is_away


def pressed(on_full: str, num_steps: int = 600) -> tuple[insitu.Session, Away]:
    """Run a model whose destination is away for most of its steps, and then there; return session and records."""
    away = Away()
    rule = insitu.Rule(sites="0", take="rows", requests="all", on_full=on_full)
    net, x = nn.Linear(256, 256), torch.randn(16, 256)
    net = nn.Sequential(net, nn.Tanh())  # type: ignore[assignment]
    session = insitu.attach(net, to=away, rules=[rule], max_rows=16)
    with torch.no_grad():
        for number in range(num_steps):
            net(x)
            if number % 20 == 19:
                session.flush(0.0)
    away.is_away = False
    session.close()
    return session, away


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_MAX_QUEUE_BYTES", "4MiB")
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")


def account(session: insitu.Session, table: str) -> int:
    """Return rows produced and neither durable nor dropped."""
    stats = session.stats()
    dropped = sum(stats.dropped.get(table, {}).values())
    return stats.produced.get(table, 0) - stats.durable.get(table, 0) - dropped


@pytest.mark.parametrize("on_full", ON_FULL)
def test_what_is_given_up_is_counted(on_full: str) -> None:
    session, records = pressed(on_full)
    steps = {row["step_id"] for row in records.rows("captures")}
    dropped = session.stats().dropped["captures"]
    assert 0 < len(steps) < 599
    assert {table: account(session, table) for table in ("captures", "steps", "summaries", "statistics")} == {
        "captures": 0,
        "steps": 0,
        "summaries": 0,
        "statistics": 0,
    }
    assert sum(dropped.values()) + len(records.rows("captures")) == 16 * 599, "all but the first step's rows"
    late = [step for step in steps if step > 220]  # four MiB hold rows of some 160
    if on_full == DROP:
        assert not late, "the newest are dropped"
        assert not records.rows("statistics")
    elif on_full == SAMPLE:
        assert late, "rows of later steps than the queue holds, taken one by one"
    else:
        measured = {row["step_id"] for row in records.rows("statistics")}
        assert not late
        assert len([step for step in measured if step > 450]) > 60, "statistics say what rows do not"
        assert measured.isdisjoint(steps)


def test_only_rules_for_rows_have_it_and_only_these_words() -> None:
    with pytest.raises(RuleError, match="on_full='wait' is not known"):
        insitu.Rule(sites="*", on_full="wait")
    with pytest.raises(RuleError, match="on_full"):
        insitu.Rule(sites="*", take="summary", on_full="sample")
