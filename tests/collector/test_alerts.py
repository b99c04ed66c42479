"""Alerts: one when an incident opens, one when it is over, whatever revisions say in between and who started again."""

from __future__ import annotations

import json

from alert_kit import alert, verdict
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import VerdictKind
from insitu_collector.notify.alerts import LATE_NS, SENT, Transitions, outcome, sent_before
from insitu_collector.verdicts.finding import Verdict

STATES = st.lists(st.sampled_from(["open", "open", "closed", "revised"]), max_size=12)


@given(incidents=st.lists(STATES, max_size=3), cut=st.integers(0, 40))
def test_states_alternate_and_a_restart_changes_nothing(incidents: list[list[str]], cut: int) -> None:
    revisions = [
        verdict(f"run-stuck-r{number}-1", revision, state)
        for number, states in enumerate(incidents)
        for revision, state in enumerate(states)
    ]
    at_once = Transitions().take(revisions)
    before, after = revisions[:cut], revisions[cut:]
    first = Transitions()
    told = first.take(before)
    restarted = Transitions(before)
    assert restarted.before == {found.incident: found for found in told}
    assert told + restarted.take(after) == at_once
    for number in range(len(incidents)):
        states = [found.state for found in at_once if found.incident == f"run-stuck-r{number}-1"]
        assert states == ["open", "closed"] * (len(states) // 2) + ["open"] * (len(states) % 2)


@given(st.lists(st.booleans(), max_size=8))
def test_what_was_sent_is_read_back_from_its_rows(switches: list[bool]) -> None:
    told = Transitions().take([verdict(revision=n, state="open" if on else "closed") for n, on in enumerate(switches)])
    rows = [{"kind": SENT, "text": outcome(found, "here")} for found in told]
    rows += [{"kind": SENT, "text": outcome(found, "there")} for found in told[:1]]
    rows.append({"kind": "warmup_end", "text": "no JSON"})
    assert sent_before(reversed(rows), "here") == ({told[-1].incident: told[-1].state} if told else {})
    assert sent_before(rows, "there") == ({told[0].incident: "open"} if told else {})
    assert sent_before(rows, "nobody") == {}


def test_quiet_kinds_are_no_alarm() -> None:
    quiet: list[Verdict] = [verdict(kind=VerdictKind.HEALTHY), verdict(kind=VerdictKind.INCONCLUSIVE)]
    assert Transitions().take(quiet) == []
    (found,) = Transitions().take([verdict(kind="acme.thermal")])
    assert found.event() == ("incident_opened", "run-stuck-r1-1: rank 1 (stage 1) is stuck.")


def test_the_document_is_what_the_contract_says() -> None:
    found = alert(revision=3, state="closed").to_json()
    assert {name: found[name] for name in ("schema", "id", "incident", "state", "run", "replica")} == {
        "schema": "insitu.alert/1",
        "id": "run-stuck-r1-1#3",
        "incident": "run-stuck-r1-1",
        "state": "closed",
        "run": "run",
        "replica": 0,
    }
    assert found["verdict"] == verdict(revision=3).to_json() | {
        name: found["verdict"][name] for name in ("window_unix_ns", "detected_unix_ns")
    }
    json.dumps(found, allow_nan=False)


def test_the_document_names_the_replica() -> None:
    assert alert("run.3-stuck-r1-1").to_json() | {"verdict": None} == {
        "schema": "insitu.alert/1",
        "id": "run.3-stuck-r1-1#0",
        "incident": "run.3-stuck-r1-1",
        "state": "open",
        "run": "run",
        "replica": 3,
        "verdict": None,
    }


def test_that_something_opened_goes_stale_and_that_it_is_over_does_not() -> None:
    opened, over = alert(), alert(state="closed")
    assert not opened.is_late(opened.unix_ns + LATE_NS)
    assert opened.is_late(opened.unix_ns + LATE_NS + 1)
    assert not over.is_late(over.unix_ns + 10 * LATE_NS)
