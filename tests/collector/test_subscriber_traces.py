"""What is sent from a store respects who asked, as far as rows say it: whose child a span is, and whether it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import pytest
from feed_kit import Writer, interval, source
from otlp_kit import attributes
from subscriber_kit import plain_environment as plain_environment
from subscriber_kit import receiver as receiver
from subscriber_kit import store as store
from target_kit import Receiver
from test_subscriber import TRACE, request, send

from insitu.forwarding.cursor import Cursor
from insitu.segments.layout import SEALED
from insitu.vocabulary import RequestEvent, Role
from insitu_collector.store import open_store

GOLDEN_STORES: Final = Path(__file__).parents[1] / "golden" / "stores"
OTHER: Final = "cd" * 16
ASKED_BY: Final = "00f067aa0ba902b7"
TOLD: Final = {"parent_span_id": ASKED_BY}


@pytest.mark.parametrize(
    ("arrived", "finished", "expected"),
    [
        (TOLD, {}, (TRACE, ASKED_BY)),
        (TOLD, {"trace_id": None}, (TRACE, ASKED_BY)),
        ({"trace_id": None}, TOLD, (TRACE, ASKED_BY)),
        (TOLD, {"trace_id": OTHER}, (OTHER, "")),
        *(({"parent_span_id": bad}, {}, (TRACE, "")) for bad in ("0" * 16, ASKED_BY[:-1], ASKED_BY.upper(), "", None)),
    ],
)
def test_a_requests_span_is_a_child_of_the_span_that_asked_for_it(
    arrived: dict[str, Any], finished: dict[str, Any], expected: tuple[str, str], store: Path, receiver: Receiver
) -> None:
    driver, writer = source(9, rank=-1, stage=-1, role=Role.DRIVER), Writer(store)
    writer.rows(driver, "sources", driver.row())
    writer.rows(driver, "requests", request(RequestEvent.ARRIVED, 0, 5, **arrived))
    writer.rows(driver, "requests", request(RequestEvent.FINISHED, 6_000_000, 3, **finished))
    writer.close()
    send(store, receiver.url)
    (span,) = receiver.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == expected


def test_a_span_without_a_trace_is_no_parent(store: Path, receiver: Receiver) -> None:
    driver, writer = source(9, rank=-1, stage=-1, role=Role.DRIVER), Writer(store)
    writer.rows(driver, "sources", driver.row())
    for event in (RequestEvent.ARRIVED, RequestEvent.FINISHED):
        writer.rows(driver, "requests", request(event, int(event), trace_id=None, parent_span_id=ASKED_BY))
    writer.close()
    send(store, receiver.url)
    assert [span.parent_span_id for span in receiver.spans()] == [b""]


@pytest.mark.parametrize("version", sorted(folder.name for folder in GOLDEN_STORES.iterdir()))
def test_requests_of_a_store_of_any_version_are_spans(version: str, store: Path, receiver: Receiver) -> None:
    for table in ("sources", "requests"):
        kept = GOLDEN_STORES / version / "store" / "v1" / SEALED / table
        shutil.copytree(kept, store / "v1" / SEALED / table)
    send(store, receiver.url)
    ends = (RequestEvent.FINISHED, RequestEvent.FAILED)
    ended = [row["request"] for row in open_store(store).table("requests").to_pylist() if row["event"] in ends]
    assert len(ended) > 3
    assert {attributes(span)["gen_ai.request.id"]: span.parent_span_id for span in receiver.spans()} == dict.fromkeys(
        ended, b""
    )
    assert Cursor(store, receiver.url).account["rows"] == {}


def test_a_request_without_a_name_that_an_older_probe_stored_is_in_no_ones_way(store: Path, receiver: Receiver) -> None:
    driver, rank, writer = source(9, rank=-1, stage=-1, role=Role.DRIVER), source(1), Writer(store)
    for of in (driver, rank):
        writer.rows(of, "sources", of.row())
    named = [request(RequestEvent.ARRIVED, 0, 5, request=name) for name in ("", "a")]
    writer.rows(driver, "requests", *named)
    row = {"count": 1, "position": 0, "phase": 1, "sample_row": -1}
    served = [{"request": name, "row": at, **row} for at, name in enumerate(("", "a"))]
    step = {"mb": 0, "phase": 1, "num_rows": 2, "num_padded": 0, "variant": 0, "dropped": 0}
    writer.rows(rank, "steps", {**step, "step_id": 0, "t0_ns": 0, "rows": served})
    writer.rows(rank, "intervals", interval(0))
    writer.close()
    send(store, receiver.url)
    (span,) = [span for span in receiver.spans() if span.name == "insitu.compute"]
    assert len(span.links) == 1
    assert Cursor(store, receiver.url).account["rows"] == {}


# -- what who asked does not sample ----------------------------------------------------------------------------------

UNSAMPLED: Final = TOLD | {"sampled": False}
DURATION: Final = "gen_ai.server.request.duration"


def write(store: Path, *asked: dict[str, Any], finished: dict[str, Any] | None = None) -> None:
    """Write a request for each way of asking, named by its place and served by step 0, the first also by step 1."""
    driver, rank, writer = source(9, rank=-1, stage=-1, role=Role.DRIVER), source(1), Writer(store)
    for of in (driver, rank):
        writer.rows(of, "sources", of.row())
    named = [({"request": f"{at}", "trace_id": f"{at + 1:032x}"}, more) for at, more in enumerate(asked)]
    writer.rows(driver, "requests", *(request(RequestEvent.ARRIVED, 0, 5, **who, **more) for who, more in named))
    row = {"count": 1, "position": 0, "phase": 1, "sample_row": -1}
    rows = [{"request": f"{at}", "row": at, **row} for at in range(len(asked))]
    step = {"mb": 0, "phase": 1, "num_rows": 1, "num_padded": 0, "variant": 0, "dropped": 0}
    for number, served in enumerate((rows, rows[:1])):
        writer.rows(rank, "steps", {**step, "step_id": number, "t0_ns": number * 1_000_000, "rows": served})
    summary = {"step_id": 1, "site": 0, "num_rows": 1, "canary": 1.0, "row_sum": 1.0, "absmax": 2.0}
    writer.rows(rank, "summaries", {**summary, "nonfinite_rows": []})
    writer.rows(rank, "intervals", interval(0), interval(1))
    ended = [request(RequestEvent.FINISHED, 6_000_000, 3, **{**who, **(finished or {})}) for who, _ in named]
    writer.rows(driver, "requests", *ended)
    writer.close()


def told(receiver: Receiver) -> tuple[set[str], dict[int, list[int]], set[int]]:
    """Return the requests that are spans, the traces that each step that is a span links to, those of exemplars."""
    requests = {attributes(span)["gen_ai.request.id"] for span in receiver.spans() if "completion" in span.name}
    steps = {
        attributes(span)["insitu.step"]: [int(link.trace_id.hex(), 16) for link in span.links]
        for span in receiver.spans()
        if span.name == "insitu.compute"
    }
    points = [*receiver.points(DURATION), *receiver.points("insitu.site.absmax")]
    return requests, steps, {int(each.trace_id.hex(), 16) for point in points for each in point.exemplars}


@pytest.mark.parametrize("finished", [UNSAMPLED, {}, {"sampled": True}, {"trace_id": None}], ids=str)
def test_what_who_asked_does_not_sample_is_no_span_and_no_exemplar(
    finished: dict[str, Any], store: Path, receiver: Receiver
) -> None:
    write(store, UNSAMPLED, finished=finished)
    send(store, receiver.url)
    assert told(receiver) == (set(), {}, set())
    assert [point.count for point in receiver.points(DURATION)] == [1], "it is counted all the same"
    assert receiver.points("insitu.site.absmax")


@pytest.mark.parametrize("sampled", [True, None])
def test_what_who_asked_samples_and_what_nobody_knows_of_is_sent(
    sampled: bool | None, store: Path, receiver: Receiver
) -> None:
    write(store, TOLD | {"sampled": sampled})
    send(store, receiver.url)
    assert told(receiver) == ({"0"}, {0: [1], 1: [1]}, {1})


def test_a_step_is_a_span_where_it_serves_any_that_is_sampled_and_links_to_that(
    store: Path, receiver: Receiver
) -> None:
    write(store, UNSAMPLED, TOLD | {"sampled": True}, TOLD, {})
    send(store, receiver.url)
    assert told(receiver) == ({"1", "2", "3"}, {0: [2, 3, 4]}, {3}), "the latest exemplar of those who have asked"


def test_a_flag_without_the_span_it_is_of_is_none(store: Path, receiver: Receiver) -> None:
    write(store, {"sampled": False})
    send(store, receiver.url)
    assert told(receiver)[:2] == ({"0"}, {0: [1], 1: [1]})


def test_a_sampler_and_a_filter_that_want_all_get_what_is_not_sampled_too(
    store: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    monkeypatch.setenv("OTEL_METRICS_EXEMPLAR_FILTER", "always_on")
    write(store, UNSAMPLED)
    send(store, receiver.url)
    assert told(receiver) == ({"0"}, {0: [], 1: []}, {1})
