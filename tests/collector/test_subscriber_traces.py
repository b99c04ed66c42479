"""A request's span, sent from a store, is a child of the span that asked for it, as far as its rows say who did."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import pytest
from feed_kit import Writer, source
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
