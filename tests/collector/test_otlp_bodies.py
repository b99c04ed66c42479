"""gzip and JSON become the bytes of a message, within bounds, or are refused."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from otlp_in_kit import any_request, normal, spans, why_refused

from insitu_collector.otlp.bodies import MAX_JSON_VALUES, from_json, unzipped
from insitu_collector.otlp.limits import MAX_REQUEST_BYTES
from insitu_collector.otlp.problems import Problem
from insitu_collector.otlp.signals import LOGS, TRACES, Signal

IDS = ("traceId", "spanId", "parentSpanId")


def as_json(request: Any) -> Any:
    """Return a request as OTLP writes it in JSON: ids in hex, enums as numbers."""
    return with_hex(MessageToDict(request, use_integers_for_enums=True))


def with_hex(said: Any) -> Any:
    if isinstance(said, dict):
        return {key: base64.b64decode(v).hex() if key in IDS else with_hex(v) for key, v in said.items()}
    return [with_hex(each) for each in said] if isinstance(said, list) else said


@given(any_request())
def test_a_request_in_json_is_the_same_as_in_protobuf(drawn: tuple[Signal, Any]) -> None:
    signal, request = drawn
    found = from_json(signal, json.dumps(as_json(request)).encode())
    assert normal(signal.request.FromString(found)) == normal(request)


def test_ids_may_be_in_capitals_and_fields_nobody_knows_are_left_out() -> None:
    request = spans(1)
    said = as_json(request)
    span = said["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    span["traceId"] = span["traceId"].upper()
    span["somethingNew"] = {"traceId": "00"}
    assert from_json(TRACES, json.dumps(said).encode()) == request.SerializeToString()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"resourceSpans": 1}',
        b'{"resourceSpans": [1]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz"}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "0"}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": 7}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "\\ud800"}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": NaN}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": -1}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": ' + b"9" * 5000 + b"}]}]}]}",
        b'{"resourceSpans": [{"\\ud800": 1}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"status": "\\ud800"}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"status": ["\\ud800"]}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"status": [["\\ud800"]]}]}]}]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"resourceSpans": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_nonsense_in_json_is_refused_for_good(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        from_json(TRACES, body)
    assert (caught.value.code, caught.value.retry_s) == (grpc.StatusCode.INVALID_ARGUMENT, None)
    assert len(caught.value.text.splitlines()) == 1


def test_a_value_nested_deeper_than_protobuf_takes_is_refused_in_json() -> None:
    value = '{"stringValue":"x"}'
    for _ in range(150):
        value = f'{{"arrayValue":{{"values":[{value}]}}}}'
    body = f'{{"resourceLogs":[{{"scopeLogs":[{{"logRecords":[{{"body":{value}}}]}}]}}]}}'
    with pytest.raises(Problem, match="not a request of OTLP logs in JSON"):
        from_json(LOGS, body.encode())


def test_json_of_more_values_than_there_is_memory_for_is_refused_before_it_is_read() -> None:
    with pytest.raises(Problem, match=f"over {MAX_JSON_VALUES} values"):
        from_json(TRACES, b'{"x":[' + b"[]," * MAX_JSON_VALUES)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_json_or_refused(body: bytes) -> None:
    assert why_refused(lambda: from_json(TRACES, body)) in (None, (grpc.StatusCode.INVALID_ARGUMENT, None))


@given(st.lists(st.binary(max_size=500), min_size=1, max_size=3))
def test_gzip_of_several_members_is_what_they_hold(parts: list[bytes]) -> None:
    assert unzipped(b"".join(gzip.compress(part) for part in parts)) == b"".join(parts)


def test_gzip_of_as_much_as_is_taken_is_taken_and_of_a_byte_more_is_not() -> None:
    assert len(unzipped(gzip.compress(bytes(MAX_REQUEST_BYTES), 1))) == MAX_REQUEST_BYTES
    with pytest.raises(Problem) as caught:
        unzipped(gzip.compress(bytes(MAX_REQUEST_BYTES + 1), 1))
    assert (caught.value.http_status, caught.value.retry_s) == (413, None)


WHOLE = gzip.compress(b"content" * 40)


@pytest.mark.parametrize(
    "body",
    [b"plain", WHOLE[:-1], WHOLE[:12], WHOLE[:-5] + b"xxxxx", WHOLE + b"more"],
    ids=["plain", "short", "begun", "another sum", "more"],
)
def test_what_is_no_gzip_is_refused(body: bytes) -> None:
    with pytest.raises(Problem, match="not gzip"):
        unzipped(body)
