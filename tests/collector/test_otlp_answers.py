"""What a receiver's answer means, by the OTLP specification."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from insitu_collector.subscriber.answers import MAX_AFTER_S, MAX_TEXT, Outcome, of_grpc, of_http
from insitu_collector.subscriber.delivery import FIRST_PAUSE_S, LONGEST_PAUSE_S, SLOW_PAUSE_S, pause_after

NOON = 1_785_585_600.0  # 2026-08-01T12:00:00Z


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        *((status, Outcome.TAKEN) for status in (200, 202)),
        *((status, Outcome.HELD) for status in (401, 403)),
        (413, Outcome.SPLIT),
        *((status, Outcome.AGAIN) for status in (429, 502, 503, 504)),
        *((status, Outcome.DEAD) for status in (301, 400, 404, 405, 415, 422, 500, 501)),
    ],
)
def test_a_status_of_http_has_one_meaning(status: int, outcome: Outcome) -> None:
    assert of_http("traces", status, {}, b"", NOON).outcome is outcome


@pytest.mark.parametrize(
    ("text", "after_s"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("999999", MAX_AFTER_S),
        ("Sat, 01 Aug 2026 12:00:30 GMT", 30.0),
        ("Sat, 01 Aug 2026 11:00:00 GMT", 0.0),
        ("soon", 0.0),
        ("-3", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(text: str, after_s: float) -> None:
    assert of_http("traces", 503, {"Retry-After": text}, b"", NOON).after_s == after_s


def details(*found: AnyMessage) -> bytes:
    return bytes(Status(code=8, details=found).SerializeToString())


def packed(message: Message) -> AnyMessage:
    found = AnyMessage()
    found.Pack(message)
    return found


RETRY = packed(RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)))
OTHER = packed(ErrorInfo(reason="quota"))


@pytest.mark.parametrize(
    ("code", "found", "outcome", "after_s"),
    [
        ("UNAUTHENTICATED", b"", Outcome.HELD, 0.0),
        ("PERMISSION_DENIED", b"", Outcome.HELD, 0.0),
        ("RESOURCE_EXHAUSTED", b"", Outcome.SPLIT, 0.0),
        ("RESOURCE_EXHAUSTED", details(OTHER), Outcome.SPLIT, 0.0),
        ("RESOURCE_EXHAUSTED", details(OTHER, RETRY), Outcome.AGAIN, 2.5),
        ("UNAVAILABLE", details(RETRY), Outcome.AGAIN, 2.5),
        ("UNAVAILABLE", b"\xff nonsense", Outcome.AGAIN, 0.0),
        ("DEADLINE_EXCEEDED", b"", Outcome.AGAIN, 0.0),
        ("CANCELLED", b"", Outcome.AGAIN, 0.0),
        ("ABORTED", b"", Outcome.AGAIN, 0.0),
        ("OUT_OF_RANGE", b"", Outcome.AGAIN, 0.0),
        ("DATA_LOSS", b"", Outcome.AGAIN, 0.0),
        ("INVALID_ARGUMENT", b"", Outcome.DEAD, 0.0),
        ("NOT_FOUND", b"", Outcome.DEAD, 0.0),
        ("UNIMPLEMENTED", b"", Outcome.DEAD, 0.0),
        ("INTERNAL", b"", Outcome.DEAD, 0.0),
    ],
)
def test_a_code_of_grpc_has_one_meaning(code: str, found: bytes, outcome: Outcome, after_s: float) -> None:
    answer = of_grpc(code, "as told", found)
    assert (answer.outcome, answer.after_s) == (outcome, after_s)


@given(st.binary(max_size=200), st.sampled_from(["traces", "metrics", "logs"]), st.integers(200, 599))
def test_whatever_a_receiver_says_is_an_answer(body: bytes, signal: str, status: int) -> None:
    answer = of_http(signal, status, {"Retry-After": body.decode("latin-1")}, body, NOON)
    assert answer.num_rejected >= 0
    assert 0 <= answer.after_s <= MAX_AFTER_S
    assert len(answer.text) <= MAX_TEXT
    assert of_grpc("UNAVAILABLE", body.decode("latin-1"), body).outcome in (Outcome.AGAIN, Outcome.HELD)


@given(st.integers(0, 5_000), st.floats(0, 1), st.sampled_from(["503", "429;5", "401"]))
def test_pauses_grow_within_bounds_and_never_undercut_what_was_asked_for(
    attempt: int, jitter: float, said: str
) -> None:
    status, _, after = said.partition(";")
    answer = of_http("traces", int(status), {"Retry-After": after}, b"", NOON)
    pause_s = pause_after(answer, attempt, jitter)
    assert pause_s >= float(after or 0)
    assert FIRST_PAUSE_S / 2 <= pause_s <= max(LONGEST_PAUSE_S, SLOW_PAUSE_S, float(after or 0))
    if said == "401":
        assert pause_s >= SLOW_PAUSE_S / 2
