"""The picture pages draw: true to the records, complete, JSON, and the same for a view that is looked at later."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from insitu.vocabulary import IntervalClass, LedgerClass, VerdictKind
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate
from insitu_collector.verdicts.finding import CLOSED, OPEN, Verdict
from insitu_dashboard.notices import Level, Notice, State
from insitu_dashboard.picture import NO_DATA, WINDOWS_S, blank_picture, picture, told_now, verdict_json
from insitu_dashboard.run_view import RunView


def now_of(view: RunView) -> int:
    assert view.last_ns is not None
    return view.timeline.unix_ns(view.last_ns) + 400_000_000


def pictured(view: RunView, window_s: int = 60) -> Any:
    unix_ns = now_of(view) if view.last_ns is not None else 10**18
    return picture(view, unix_ns, window_s, run="5eed", replica=0)


def test_it_names_the_slow_stage(view: RunView) -> None:
    found = pictured(view)
    verdicts = found["verdicts"]
    assert verdicts[0]["text"].startswith("stage 1 limits the pipeline")
    assert verdicts[0]["remedy"]
    assert [alarm["kind"] for alarm in found["alarms"]] == ["stage_limits"]
    assert found["header"]["state"] == "live"
    assert found["header"]["age_s"] == 0.4
    assert found["ticks"], "the verdict marks the charts"


@pytest.mark.parametrize(("fault", "how"), [(None, "2 hosts, ±0."), ("clock_unknown", "2 hosts, by their wall clocks")])
def test_the_head_says_how_well_the_hosts_clocks_are_known(fault: str | None, how: str) -> None:
    faults = (Fault(fault, host=1),) if fault else ()
    view = RunView()
    view.add(simulate(Scenario(seed=5, seconds=3.0, hosts=2, faults=faults)))
    view.settle()
    assert pictured(view)["header"]["clock"].startswith(how)


def test_steps_of_ranks_that_run_together_count_once() -> None:
    one, two = RunView(), RunView()
    one.add(simulate(Scenario(seed=5, seconds=3.0)))
    two.add(simulate(Scenario(seed=5, seconds=3.0, tensor_parallel=2)))
    assert sum(two.steps.values()) < 1.5 * sum(one.steps.values())


@pytest.mark.parametrize("window_s", WINDOWS_S)
def test_shares_sum_to_one_and_the_heat_map_to_a_hundred(view: RunView, window_s: int) -> None:
    found = picture(view, now_of(view), window_s, run="5eed", replica=0)
    json.loads(json.dumps(found, allow_nan=False))
    for part in ("grid", "mix"):
        for cell in found[part]:
            assert sum(cell["classes"].values()) == pytest.approx(1, abs=0.01)
    heat = found["heat"]
    assert 1 <= len(heat["unix_s"]) <= 361
    for row, _ in enumerate(heat["lanes"]):
        for column in range(len(heat["unix_s"])):
            cells = [percent[row][column] for percent in heat["percent"].values()]
            assert cells == [NO_DATA] * len(cells) or sum(cells) == pytest.approx(100, abs=len(cells))
    columns = {len(values) for values in found["latency"].values()}
    assert len(columns) == 1


def test_an_hour_is_drawn_of_wide_tiles_and_says_the_same() -> None:
    view = RunView()
    view.add(simulate(Scenario(seed=6, seconds=33.0, faults=(Fault("slow", 9.0, 1, ms=20.0),))))
    view.settle()
    hour, minutes = pictured(view, 3600), pictured(view, 300)
    assert hour["mix"] == minutes["mix"]
    assert (hour["heat"]["bucket_s"], minutes["heat"]["bucket_s"]) == (10, 1)
    assert hour["heat"]["percent"].keys() == minutes["heat"]["percent"].keys()
    begin = hour["heat"]["unix_s"][1]
    first = minutes["heat"]["unix_s"].index(begin)
    for cls, rows in minutes["heat"]["percent"].items():
        for row, cells in enumerate(rows):
            mean = sum(cells[first : first + 10]) / 10
            assert hour["heat"]["percent"][cls][row][1] == pytest.approx(mean, abs=1)


def test_a_class_that_nobody_was_in_is_not_drawn_and_one_of_a_later_version_is_other(
    tables: dict[str, pa.Table],
) -> None:
    rows = tables["intervals"]
    newer = pc.and_(pc.equal(rows["rank"], 1), pc.equal(rows["cls"], int(IntervalClass.COMPUTE)))
    cls = pc.if_else(newer, pa.scalar(200, pa.uint8()), rows["cls"])
    place = rows.schema.get_field_index("cls")
    view = RunView()
    view.add({**tables, "intervals": rows.set_column(place, rows.schema.field("cls"), cls)})
    view.settle()
    found = pictured(view)
    assert LedgerClass.GC not in found["heat"]["percent"]
    assert found["grid"][1]["cls"] == LedgerClass.OTHER
    assert found["mix"][1]["classes"][LedgerClass.OTHER] > 0.3
    assert LedgerClass.OTHER not in found["mix"][0]["classes"]


def test_a_look_at_an_earlier_time_shows_what_was_so_then(view: RunView) -> None:
    before = 1000 * SECOND + 4 * SECOND
    found = picture(view, now_of(view), 10, run="5eed", replica=0, at_ns=before)
    assert int(found["end"]) == view.timeline.unix_ns(before)
    assert found["alarms"] == []
    assert found["heat"]["unix_s"][-1] <= view.timeline.unix_ns(before) / 1e9


def verdict(kind: str, state: str, name: str = "v", detected: int = 1) -> Verdict:
    return Verdict(
        verdict=name,
        revision=0,
        state=state,
        kind=kind,
        on_stage=1,
        on_rank=1,
        layer=None,
        site="<img src=x onerror=alert(1)>",
        step_id=None,
        phase=None,
        confidence=1.0,
        text=f"{kind} text",
        remedy="r",
        window_start_unix_ns=detected,
        window_end_unix_ns=detected + 1,
        detected_unix_ns=detected,
        num_requests=0,
    )


def test_what_is_open_is_told_most_severe_first() -> None:
    pause = verdict(VerdictKind.GC_PAUSE, OPEN, "a")
    stuck = verdict(VerdictKind.STUCK, OPEN, "b", 5)
    healthy = verdict(VerdictKind.HEALTHY, OPEN, "c")
    assert told_now([pause, stuck, healthy], is_over=False) == [stuck, pause]
    ours, theirs = verdict(VerdictKind.CLOCK_UNCERTAIN, OPEN, "d"), verdict("acme.thermal", OPEN, "e", 0)
    assert told_now([theirs, healthy, ours], is_over=False) == [ours, theirs]
    assert told_now([healthy, theirs], is_over=False) == [theirs]


def test_what_is_over_gives_way_to_how_it_is_now() -> None:
    stuck = verdict(VerdictKind.STUCK, CLOSED, "b")
    healthy = verdict(VerdictKind.HEALTHY, OPEN, "c")
    assert told_now([stuck, healthy], is_over=False) == [healthy]
    assert told_now([stuck, healthy], is_over=True) == [stuck], "of a run that ended, what was found stands"
    assert told_now([stuck], is_over=False) == []


def test_nanoseconds_travel_as_text() -> None:
    found = verdict_json(replace(verdict(VerdictKind.STUCK, OPEN), window_start_unix_ns=2**60 + 1))
    assert found["t0"] == str(2**60 + 1)


def test_nothing_has_a_picture_too() -> None:
    notice = Notice(Level.ERROR, "gone.", "look.")
    found = blank_picture(State.ERROR, notice)
    assert found.keys() == pictured(RunView()).keys()
    assert found["notice"] == {"level": "error", "text": "gone.", "remedy": "look."}
    assert blank_picture(State.EMPTY)["notice"]["text"].startswith("No record")


def test_an_empty_view_gives_an_empty_picture() -> None:
    found = picture(RunView(), 10**18, 60, run="5eed", replica=0)
    assert found["header"]["state"] == "empty"
    assert (found["grid"], found["verdicts"], found["heat"]["unix_s"]) == ([], [], [])
