"""Where a run's requests spent their time: all of it, once, and one request in particular."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from insitu.vocabulary import RequestClass, RequestEvent
from insitu_collector.clocks.timeline import timeline_of
from insitu_collector.requests import report
from insitu_collector.requests.records import records_of_tables
from insitu_collector.requests.report import NoSuchRequest, RequestReport, request_report, to_json, to_lines
from insitu_collector.rows.slices import Groups, latest
from insitu_collector.simulate import Fault, Scenario, simulate

Tables = dict[str, pa.Table]


@pytest.fixture(scope="module")
def run() -> Tables:
    groups = Groups().sort(simulate(Scenario(seed=3, seconds=3.0, faults=(Fault("kv_small", size=300),))))
    group = latest(groups)
    assert group is not None
    return groups[group]


def told(run: Tables, name: str = "") -> RequestReport:
    found = request_report(records_of_tables(run), name)
    assert found is not None
    return found


def test_the_classes_of_all_and_of_one_sum_to_lives(run: Tables) -> None:
    found = told(run)
    slowest = found.slowest
    assert slowest is not None
    assert sum(slowest.ns.values()) == slowest.end_ns - slowest.begin_ns == found.end_to_end_ns[-1]
    ended = pc.sum(pc.equal(run["requests"]["event"], int(RequestEvent.FINISHED))).as_py()
    assert (len(found.end_to_end_ns), found.num_requests - found.num_open) == (ended, ended)
    assert sum(found.waits.values()) == found.ns[RequestClass.PIPELINE_WAIT]
    assert list(found.waits.values()) == sorted(found.waits.values(), reverse=True)


def test_a_few_at_a_time_say_the_same(run: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = told(run)
    monkeypatch.setattr(report, "AT_ONCE", 3)
    few = told(run)
    assert (few.ns, few.waits, few.slowest) == (whole.ns, whole.waits, whole.slowest)


def test_one_request_has_its_spans(run: Tables) -> None:
    one = told(run, "req-4").asked
    assert one is not None
    assert (one.spans[0][0], one.spans[-1][1]) == (one.begin_ns, one.end_ns)
    assert all(before[1] == after[0] and before[2:] != after[2:] for before, after in pairwise(one.spans))
    clock = timeline_of(run["sources"])
    document = to_json(told(run, "req-4"), clock)["asked"]
    assert document["request"] == "req-4"
    assert len(document["spans"]) == len(one.spans)
    assert {row["class"] for row in document["spans"] if row["rank"] is not None} == {"pipeline_wait"}
    assert document["spans"][0]["begin_unix_ns"] == clock.unix_ns(one.begin_ns) == document["begin_unix_ns"]
    with pytest.raises(NoSuchRequest, match="no request 'req-x'"):
        told(run, "req-x")


def test_the_document_holds_every_class(run: Tables) -> None:
    document: dict[str, Any] = to_json(told(run), timeline_of(run["sources"]))
    assert list(document["seconds"]) == [str(cls) for cls in RequestClass]
    assert document["asked"] is None
    assert document["end_to_end_s"]["p50"] <= document["end_to_end_s"]["p95"] == told(run).quantile_s(0.95)
    assert {row["rank"] for row in document["waits"]} == {0, 1}


def test_people_read_shares_and_what_is_missing(run: Tables) -> None:
    text = "\n".join(to_lines(told(run)))
    assert text.startswith("Where requests' time went, ")
    assert "  kv_wait " in text and "    rank 1, compute " in text and "The slowest, req-" in text
    assert "no end is on record" in text, "the run ends with requests under way"
    assert to_lines(told(run, "req-4"))[0].startswith("Request req-4: ")
    partial = replace(told(run), num_unborn=2, unsplit_ns=10**9)
    assert "Of 2 of them no arrival is on record." in "\n".join(to_lines(partial))
    assert "1.00 s of decode" in "\n".join(to_lines(partial))


def test_a_record_without_requests_has_no_report(run: Tables) -> None:
    bare = {name: rows for name, rows in run.items() if name not in ("requests", "steps")}
    assert request_report(records_of_tables(bare)) is None
    unnamed = told({name: rows for name, rows in run.items() if name != "requests"})
    assert (unnamed.num_unborn, unnamed.end_to_end_ns, unnamed.slowest) == (unnamed.num_requests, (), None)
    assert unnamed.quantile_s(0.5) is None
    assert to_lines(unnamed)[0].endswith(f"{unnamed.num_requests} requests:")
