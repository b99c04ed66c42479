"""Verdict `prefill_delays_decode`: told where prompts take decoding requests' time, and not for a hang or a few."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from insitu.vocabulary import IntervalClass, Phase, RequestEvent, VerdictKind
from insitu_collector.judge.judgement import Judgement
from insitu_collector.requests.records import RequestRecords
from insitu_collector.requests.times import RequestTimes
from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import MS, Fault, Scenario, simulate
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.times import StepTimes
from insitu_collector.verdicts import prefill_delays_decode
from insitu_collector.verdicts.finding import Finding, Verdict, standing

NUM = 200
STEP_MS = 10.0
WINDOW = (0, int(NUM * STEP_MS * MS))


def columns(names: str, rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    return {name: np.array(column) for name, column in zip(names.split(), zip(*rows, strict=True), strict=True)}


def times(mixed_ms: float, every: int = 5, odd: dict[int, float] | None = None) -> RequestTimes:
    """Two requests decode in every step of 4 ms; every so many carry a prompt of 50 rows. odd: step -> ms."""
    entries, intervals = [], []
    for step in range(NUM):
        begin, ms = int(step * STEP_MS * MS), 4.0
        entries += [(name, step, step, 1, Phase.DECODE, begin) for name in "ab"]
        if step % every == 0:
            entries.append((f"p{step}", step, 0, 50, Phase.PREFILL, begin))
            ms = mixed_ms
        ms = (odd or {}).get(step, ms)
        intervals.append((0, begin, begin + int(ms * MS), IntervalClass.COMPUTE, step, -1))
    events = [(name, RequestEvent.FIRST_TOKEN, 0, -1) for name in "ab"]
    return RequestTimes(
        RequestRecords(
            {**columns("request event t step", events), "request": np.array(["a", "b"], object)},
            {
                **columns("request step position count phase t", entries),
                "request": np.array([e[0] for e in entries], object),
            },
            columns("rank t0 t cls step peer", intervals),
            {0: 0},
            WINDOW[1],
        )
    )


def look(found: RequestTimes, baseline: Baseline | None = None, **options: bool) -> list[Finding]:
    fits = [(baseline or Baseline()).expectation(0)]
    return prefill_delays_decode.look(found, found.ledger(0, len(found), WINDOW), WINDOW, fits, **options)


def test_the_text_has_the_figures() -> None:
    (found,) = look(times(12.0))
    assert found.text == (
        "prompts delay decoding: a step that carries the prompts of others computes 12.0 ms, 3.0x one that only "
        "decodes (4.0 ms); that took 16 % of the time of requests past their first token, 2 of them; the next token "
        "takes 10 ms (median) without them and 18 ms with."
    )
    assert found.requests == ("a", "b")
    assert found.confidence == 1.0
    assert found.remedy.startswith("Lower `--token-budget` below the 52 rows")


def learnt(row_ms: float) -> Baseline:
    """A rank that was seen to take 4 ms a step and so much a row of a prompt."""
    random = np.random.default_rng(0)
    prefill = random.integers(0, 60, 300)
    shape = np.stack([prefill + 2, prefill, np.full(300, 100), np.full(300, 2), np.full(300, 2)], axis=1).astype(
        np.float64
    )
    cpu = np.asarray((4.0 + row_ms * prefill) * MS, np.float64)
    zeros = np.zeros(300, np.int64)
    baseline = Baseline()
    baseline.learn(0, StepTimes(zeros, zeros, cpu, cpu, 0.0 * cpu, shape, np.zeros(300, bool)))
    return baseline


def test_a_budget_is_advised_by_the_fitted_cost_of_a_row() -> None:
    (found,) = look(times(12.0), learnt(8 / 50))  # half of 4 ms is 12 rows; beside two that decode, in eights
    assert found.remedy.startswith("`--token-budget 8` (steps had up to 52 rows)")


def test_no_budget_where_the_fit_does_not_describe_what_was_seen() -> None:
    assert "--token-budget` below" in look(times(12.0), learnt(0.01))[0].remedy


@pytest.mark.parametrize(
    "quiet",
    [
        times(5.0),  # they add too little
        times(12.0, every=25),  # too few
        times(6.4, odd={100: 2000.0}),  # one hung
        times(5.0, odd=dict.fromkeys(range(0, NUM, 15), 60.0)),  # some were held by something else
    ],
)
def test_what_prompts_do_not_do_is_not_theirs(quiet: RequestTimes) -> None:
    assert look(quiet) == []


def test_a_busy_host_asks_for_more_and_what_was_told_for_less() -> None:
    weak = times(9.5)
    assert len(look(weak)) == 1
    assert look(weak, contended=True) == []
    weaker = times(7.0)
    assert look(weaker) == []
    assert len(look(weaker, already=True)) == 1


def judged(tables: dict[str, pa.Table]) -> list[Verdict]:
    judgement = Judgement("run")
    parts = list(seconds(tables))
    return [verdict for n, part in enumerate(parts) for verdict in judgement.look(part, final=n == len(parts) - 1)]


def test_long_prompts_in_a_pipeline_are_told_and_stages_are_judged_as_ever() -> None:
    long = simulate(Scenario(seed=2, seconds=10.0, requests_per_s=5.0, prompt=(300, 500)))
    assert {verdict.kind for verdict in standing(judged(long))} == {VerdictKind.PREFILL_DELAYS_DECODE}


@pytest.mark.parametrize("fault", [None, Fault("hang", 4.0, ms=3000.0), Fault("slow", 4.0), Fault("gc", 3.0, ms=300.0)])
def test_ordinary_prompts_are_not_told_whatever_else_goes_wrong(fault: Fault | None) -> None:
    found = judged(simulate(Scenario(seed=4, seconds=12.0, faults=(fault,) if fault else ())))
    assert VerdictKind.PREFILL_DELAYS_DECODE not in {verdict.kind for verdict in found}
