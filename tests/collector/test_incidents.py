"""Incidents: findings over time become verdicts that open once, sharpen rarely, and close."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import SEVERITY, VerdictKind
from insitu_collector.judge.incidents import Incidents
from insitu_collector.verdicts.finding import CLOSED, OPEN, Finding, Verdict, latest_revisions, num_revised, standing

S = 1_000_000_000


def finding(kind: VerdictKind = VerdictKind.STAGE_LIMITS, at_s: float = 0, **more: Any) -> Finding:
    fields: dict[str, Any] = {"on_stage": 1, "on_rank": 1, "size": 10.0, "text": f"{kind} at {at_s:g} s", "remedy": "."}
    return Finding(kind=kind, t0_ns=int(at_s * S) - S, t1_ns=int(at_s * S), **{**fields, **more})


def incidents(revisions: dict[str, int] | None = None) -> Incidents:
    return Incidents("run", lambda t_ns: t_ns + 1_000 * S, revisions)


def follow(kinds: Incidents, looks: list[list[Finding]], every_s: float = 1.0) -> list[Verdict]:
    """One look each second; stamped with its time."""
    told: list[Verdict] = []
    for place, found in enumerate(looks):
        now = int(place * every_s * S)
        told += kinds.update(found, now, now + 1_000 * S)
    return told


def test_a_lasting_finding_is_told_once_and_closed_once() -> None:
    told = follow(incidents(), [[], *([finding(at_s=t)] for t in range(1, 6)), [], [], [], []])
    assert [(verdict.revision, verdict.state) for verdict in told] == [(0, OPEN), (1, CLOSED)]
    first, last = told
    assert first.verdict == last.verdict
    assert first.detected_unix_ns == last.detected_unix_ns == 1_001 * S
    assert (last.window_start_unix_ns, last.window_end_unix_ns) == (1_000 * S, 1_005 * S)


def test_a_finding_that_flickers_stays_one_open_verdict() -> None:
    told = follow(incidents(), [[finding(at_s=t)] if t % 2 else [] for t in range(12)])
    assert [(verdict.revision, verdict.state) for verdict in told] == [(0, OPEN)]


def test_a_finding_that_grows_is_told_again_but_not_at_once() -> None:
    sizes = [10, 30, 30, 30, 30, 31, 32]
    told = follow(incidents(), [[finding(at_s=t, size=float(size))] for t, size in enumerate(sizes)])
    assert [verdict.revision for verdict in told] == [0, 1]
    assert told[1].text.endswith("at 3 s")


def test_the_wording_of_the_strongest_look_is_kept() -> None:
    looks = [[finding(at_s=0, text="weak", size=5.0)], [finding(at_s=1, text="strong", size=20.0)]]
    looks += [[finding(at_s=2, text="fading", size=8.0, confidence=0.5)], [], [], []]
    assert follow(incidents(), looks)[-1].text == "strong"


def test_an_incident_that_returns_soon_is_the_same_and_later_another() -> None:
    soon = follow(incidents(), [[finding()], [], [], [], [finding(at_s=4)], []])
    assert [(v.verdict, v.state) for v in soon] == [("run-stage_limits-r1-1", state) for state in (OPEN, CLOSED, OPEN)]
    late = follow(incidents(), [[finding()], *[[] for _ in range(20)], [finding(at_s=21)]])
    assert [verdict.verdict for verdict in late][-1] == "run-stage_limits-r1-2"


def test_what_could_not_be_decided_neither_opens_nor_closes() -> None:
    kinds = incidents()
    kinds.update([finding()], 0, 0)
    undecided = frozenset({VerdictKind.STAGE_LIMITS})
    assert kinds.update([], 20 * S, 0, undecided=undecided) == []
    assert kinds.open_ranks(VerdictKind.STAGE_LIMITS) == {1}
    assert [verdict.state for verdict in kinds.update([], 21 * S, 0)] == [CLOSED]


def test_requests_are_gathered_and_at_most_twenty_are_named() -> None:
    kinds = incidents()
    for t in range(5):
        kinds.update([finding(at_s=t, requests=tuple(f"r{n:02}" for n in range(10 * t, 10 * t + 10)))], t * S, 0)
    (last,) = kinds.end(5 * S)
    assert (last.num_requests, len(last.requests), last.state) == (50, 20, OPEN)


def test_a_judge_that_starts_again_repeats_nothing_that_is_stored() -> None:
    looks = [[finding(at_s=t)] for t in range(3)] + [[], [], []]
    told = follow(incidents(), looks)
    again = follow(incidents({verdict.verdict: verdict.revision for verdict in told}), looks)
    assert again == []


def verdict(kind: VerdictKind, name: str = "v", **more: Any) -> Verdict:
    fields: dict[str, Any] = dict.fromkeys(("on_stage", "on_rank", "layer", "site", "step_id", "phase"), None) | {
        "confidence": 1.0,
        "text": "",
        "remedy": "",
        "detected_unix_ns": 0,
        "num_requests": 0,
        "requests": [],
    }
    fields |= {"verdict": f"run-{name}", "revision": 0, "state": OPEN}
    return Verdict(kind=kind, **{**fields, "window_start_unix_ns": 0, "window_end_unix_ns": 0, **more})


def test_healthy_stands_alone_or_not_at_all() -> None:
    healthy = verdict(VerdictKind.HEALTHY, "h")
    assert standing([healthy]) == [healthy]
    stuck = verdict(VerdictKind.STUCK, "s", state=CLOSED)
    assert standing([healthy, stuck]) == [stuck]
    withdrawn = verdict(VerdictKind.STUCK, "s", state="revised", revision=1)
    assert standing([healthy, stuck, withdrawn]) == [healthy]
    assert num_revised([healthy, stuck, withdrawn], "run5") == 1


def test_the_open_one_of_healthy_and_inconclusive_stands() -> None:
    first = verdict(VerdictKind.INCONCLUSIVE, "i", state=CLOSED, window_end_unix_ns=9)
    assert [v.kind for v in standing([first, verdict(VerdictKind.HEALTHY, "h")])] == [VerdictKind.HEALTHY]


@given(st.lists(st.tuples(st.sampled_from(list(VerdictKind)), st.integers(0, 9)), max_size=12))
def test_standing_verdicts_are_ordered_by_severity_then_time(drawn: list[tuple[VerdictKind, int]]) -> None:
    told = [verdict(kind, str(n), window_start_unix_ns=t) for n, (kind, t) in enumerate(drawn)]
    order = [(SEVERITY.index(v.kind), v.window_start_unix_ns) for v in standing(told)]
    assert order == sorted(order)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5)), max_size=12))
def test_a_row_round_trips_and_the_last_revision_wins(drawn: list[tuple[str, int]]) -> None:
    told = [verdict(VerdictKind.GC_PAUSE, name, revision=n, requests=["x"]) for name, n in drawn]
    assert [Verdict.from_row(v.row()) for v in told] == told
    assert {v.verdict: v.revision for v in latest_revisions(told)} == {
        f"run-{name}": max(n for other, n in drawn if other == name) for name, _ in drawn
    }


def test_a_time_that_is_taken_back_does_not_keep_an_incident_open() -> None:
    kinds = incidents()
    assert kinds.update([finding(at_s=3600)], 3600 * S, 3600 * S)[0].state == OPEN
    kinds.set_back(4 * S)
    assert kinds.update([], 5 * S, 5 * S) == [], "not found for 1 s"
    assert [verdict.state for verdict in kinds.update([], 7 * S, 7 * S)] == [CLOSED]
    (again,) = kinds.update([finding(at_s=9)], 9 * S, 9 * S)
    assert (again.revision, again.state) == (2, OPEN), "the same one"
