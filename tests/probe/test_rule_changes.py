"""Rules change between two steps, never inside one; each step is read back under the rules it ran with."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.row_forms import decoded
from insitu.rules.changes import RuleChanges
from insitu.rules.in_force import InForce
from insitu.rules.rule import RuleError
from insitu.session.step import StepRecord
from insitu.sites.site import Site
from insitu.slabs.slab import Plan
from insitu.testing import Recording

WIDTH = 6
ROWS = [insitu.Rows("a", start=0, count=3, position=0, capture=True)]


@pytest.fixture(autouse=True)
def budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long these steps take, the governor leaves none out."""
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")


def rule(sites: str = "output", **fields: Any) -> insitu.Rule:
    return insitu.Rule(sites=sites, **fields)


def net_of(num_sites: int = 1) -> nn.Sequential:
    return nn.Sequential(*(nn.Identity() for _ in range(num_sites)))


def captured(recording: Recording) -> dict[int, list[tuple[str, int]]]:
    """Return by step the sites and rows that were kept; each row has the values it was computed with."""
    names = {row["site"]: row["name"] for row in recording.rows("sites")}
    found: dict[int, list[tuple[str, int]]] = {}
    for row in recording.rows("captures"):
        values, places = decoded(row["dtype"], row["data"])
        expected = x_of(row["step_id"])[row["row"]]
        wanted = expected if places is None else expected[places.astype(np.int64)]
        assert values.tolist() == wanted.tolist()
        found.setdefault(row["step_id"], []).append((names[row["site"]], row["row"]))
    return found


def x_of(step: int) -> torch.Tensor:
    """Return values that bfloat16 holds exactly, and that say of which step they are."""
    return (torch.arange(3 * WIDTH).reshape(3, WIDTH) + step % 64).float()


def run(session: insitu.Session, net: nn.Module, step: int) -> None:
    with session.step(step, rows=ROWS):
        net(x_of(step))


def test_a_change_is_in_force_from_the_next_step_on(insitu_records: Recording) -> None:
    net = net_of()
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=[rule(rows="last")]) as session:
        run(session, net, 0)
        run(session, net, 1)
        with session.step(2, rows=ROWS):
            assert session.set_rules([rule(rows="first:1"), rule("0")], who="a test") == 1
            net(x_of(2))
        standing = session.rules()
        assert (standing.version, standing.next_version, len(standing.rules)) == (0, 1, 1)
        run(session, net, 3)
        assert session.rules().version == 1
        assert session.set_rules([]) == 2
        run(session, net, 4)
        assert session.rules().rules == ()
    assert captured(insitu_records) == {
        1: [("output", 2)],
        2: [("output", 2)],
        3: [("0", 0), ("0", 1), ("0", 2), ("output", 0)],
    }
    events = [(row["step_id"], row["text"]) for row in insitu_records.rows("events", kind="rules_in_force")]
    assert events == [
        (3, "version 1 by a test: output,rows=first:1; 0 (was version 0)"),
        (4, "version 2 by this process: no rule (was version 1)"),
    ]
    assert session.stats().dropped == {}


def test_rules_that_are_set_before_the_first_step_take_rows_from_the_second_on(insitu_records: Recording) -> None:
    net = net_of()
    with torch.inference_mode(), insitu.attach(net, to=insitu_records) as session:
        session.set_rules([rule(topk=2, cast="bf16")])
        for step in range(3):
            run(session, net, step)
    assert captured(insitu_records) == {step: [("output", row) for row in range(3)] for step in (1, 2)}


def test_statistics_can_be_set_and_taken_back(insitu_records: Recording) -> None:
    net = net_of()
    with torch.inference_mode(), insitu.attach(net, to=insitu_records) as session:
        for step in range(9):
            if step == 3:
                session.set_rules([rule(take="summary", every=1)])
            if step == 6:
                session.set_rules([rule(rows="last")])
            run(session, net, step)
    assert sorted({row["step_id"] for row in insitu_records.rows("statistics")}) == [3, 4, 5]
    assert sorted(captured(insitu_records)) == [6, 7, 8]


def changes_of(*rules: insitu.Rule, max_rows: int = 8, num_sites: int = 1) -> RuleChanges:
    sites = tuple(Site(n, name, name) for n, name in enumerate(("L0.mlp_out", "L0.resid_post", "logits")[:num_sites]))
    return RuleChanges(InForce(Plan(sites, rules, max_rows), torch.device("cpu")))


def step_at(t_ns: int, step_id: int = 0) -> StepRecord:
    return StepRecord(step_id, 0, None, t_ns, ROWS, 3, 0, 0)


def test_rules_for_a_time_end_by_themselves_at_a_step(insitu_records: Recording) -> None:
    changes, told = changes_of(), []
    changes.tell = lambda kind, text, step_id: told.append((kind, text, step_id))
    changes.learn({0: (WIDTH, torch.float32)})
    assert changes.set([rule("*", rows="last")], "a", None) == 1
    before = time.monotonic_ns()
    assert changes.set([rule("*")], "b", 60.0) == 2
    after = time.monotonic_ns()
    assert changes.turn(step_at(before, 7)).version == 2
    standing = changes.standing()
    assert standing.left_s is not None and 59.0 < standing.left_s <= 60.0
    assert changes.turn(step_at(before + 59_000_000_000, 8)).version == 2
    assert changes.turn(step_at(after + 60_000_000_000, 9)).version == 1
    assert changes.turn(step_at(after + 61_000_000_000, 10)).version == 1
    assert [text for _, text, _ in told] == [
        "version 2 by b for 60 s: * (was version 0)",
        "version 1 again: the time of version 2 is over",
    ]
    assert [step_id for _, _, step_id in told] == [7, 9]
    assert (changes.standing().version, changes.standing().left_s) == (1, None)


def test_rules_without_an_end_end_those_with_one(insitu_records: Recording) -> None:
    changes = changes_of()
    changes.set([rule("*")], "a", 60.0)
    now = time.monotonic_ns()
    assert changes.turn(step_at(now)).version == 1
    changes.set([rule("*", rows="last")], "b")
    assert changes.turn(step_at(now)).version == 2
    changes.set([rule("*")], "c", 60.0)
    changes.set([rule("*")], "d", 30.0)
    assert changes.turn(step_at(now)).version == 4
    assert changes.turn(step_at(now + 120_000_000_000)).version == 2


def test_a_version_that_is_not_newer_changes_nothing() -> None:
    changes = changes_of()
    assert changes.set([rule("*")], "a", None, version=5) == 5
    assert changes.set([], "b", None, version=5) == 5
    assert changes.set([], "b", None, version=4) == 5
    assert changes.turn(step_at(0)).plan.rules == (rule("*"),)
    assert changes.set([], "c") == 6


@pytest.mark.parametrize(
    ("rules", "for_s", "message"),
    [
        ([rule("L0.mlp_ot")], None, "no site matches 'L0.mlp_ot'; the nearest are L0.mlp_out, "),
        ([rule("logits"), rule("L9.mlp_out")], None, "only sites that were attached can be named"),
        ([rule("*", rows="first:9")], None, "max_rows is 8"),
        ([rule("*")], 0.0, "0 s is no time"),
        ([rule("*")], 1e9, "1e[+]09 s is no time to follow rules for; it may be up to 7 days"),
        ([rule("*")], 10**400, "1e[+]300 s is no time to follow rules for; it may be up to 7 days"),
        ([rule("*")], float("nan"), "nan s is no time"),
    ],
)
def test_rules_that_cannot_be_are_refused_and_nothing_changes(
    rules: list[insitu.Rule], for_s: float | None, message: str
) -> None:
    changes = changes_of(rule("logits"), num_sites=3)
    with pytest.raises(RuleError, match=message):
        changes.set_here(rules, "a", for_s)
    assert (changes.turn(step_at(0)).version, changes.standing().next_version) == (0, 0)
    assert changes.set_here([rule("L0.*")], "a", None) == 1


def test_what_the_flight_recorder_holds_stays_whatever_is_set(insitu_records: Recording) -> None:
    net, flight = net_of(2), insitu.Flight(rows="0", pre_s=60, post_s=0)
    with (
        torch.inference_mode(),
        insitu.attach(net, to=insitu_records, rules=[rule("1")], flight=flight) as session,
    ):
        for step in range(3):
            run(session, net, step)
        session.set_rules([rule(rows="last")])
        assert session.rules().rules == (rule("1"),), "what arms the recorder is no rule of anybody's"
        for step in range(3, 6):
            run(session, net, step)
        assert session.rules().rules == (rule(rows="last"),)
        session.dump("a test")
    rows = captured(insitu_records)
    held = [("0", row) for row in range(3)]
    assert {step: sorted(found) for step, found in rows.items()} == {
        **{step: sorted([*held, *(("1", row) for row in range(3))]) for step in (1, 2)},
        **{step: sorted([*held, ("output", 2)]) for step in (3, 4, 5)},
    }


def test_statistics_of_other_packages_are_those_of_attach() -> None:
    fixed = rule("*", take="acme.total", every=4)
    changes = changes_of(fixed)
    with pytest.raises(RuleError, match=r"take='acme\.other': statistics of other packages are those that attach"):
        changes.set([rule("*", take="acme.other")], "a")
    changes.set([rule("*", rows="last")], "a")
    assert changes.turn(step_at(0)).plan.rules == (rule("*", rows="last"), fixed)
    changes.set([fixed], "a")
    assert changes.turn(step_at(0)).plan.rules == (fixed,)


def test_rules_may_not_take_more_memory_than_a_session_has() -> None:
    changes = changes_of(max_rows=1 << 20)
    changes.learn({0: (64, torch.float32)})
    with pytest.raises(
        RuleError, match=r"would take 512 MiB, and a session has 64: name fewer sites, use cast= or topk="
    ):
        changes.set([rule("*")], "a")
    assert changes.set([rule("*", topk=4, cast="bf16")], "a") == 1


def test_a_session_without_a_model_has_no_rules(insitu_records: Recording) -> None:
    with insitu.start(to=insitu_records) as session:
        with pytest.raises(RuleError, match="observes no model"):
            session.set_rules([rule("*")])
        assert session.rules().version == 0
    assert insitu.off().set_rules([rule("*")]) == 0
    assert insitu.off().rules().rules == ()


def test_rules_that_change_while_steps_run_lose_and_invent_nothing(insitu_records: Recording) -> None:
    net, num_steps, num_versions = net_of(2), 1500, 12
    choices = [
        [rule("0", rows="last"), rule("1", cast="bf16")],
        [rule("*", topk=2), rule("1", take="summary", every=2)],
        [],
        [rule("output", rows="first:1", cast="fp16")],
    ]
    wanted = [
        {("0", 2), ("1", 0), ("1", 1), ("1", 2)},
        {(site, row) for site in ("0", "1", "output") for row in range(3)},
        set(),
        {("output", 0)},
    ]
    is_over = threading.Event()
    with torch.inference_mode(), insitu.attach(net, to=insitu_records) as session:
        run(session, net, 0)

        def change() -> None:
            turn = 0
            while not is_over.is_set():
                session.set_rules(choices[turn % 4])
                turn += 1

        thread = threading.Thread(target=change)
        thread.start()
        step, seen = 0, {0}
        while step < num_steps or len(seen) < num_versions:  # a busy machine gives the other thread few turns
            step += 1
            run(session, net, step)
            seen.add(session.rules().version)
        is_over.set()
        thread.join()
    num_steps = step + 1
    versions = [0] * num_steps
    for row in insitu_records.rows("events", kind="rules_in_force"):
        versions[row["step_id"] :] = [int(row["text"].split()[1])] * (num_steps - row["step_id"])
    found = captured(insitu_records)
    assert seen <= set(versions)
    stats = session.stats()
    lost = sum(stats.dropped.get("captures", {}).values())
    num_wanted = 0
    for step in range(1, num_steps):
        here = wanted[(versions[step] - 1) % 4] if versions[step] else set()
        assert set(found.get(step, [])) in (here, set())
        num_wanted += len(here)
    assert sum(map(len, found.values())) + lost == num_wanted == stats.produced["captures"]
