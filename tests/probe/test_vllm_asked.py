"""What a request to vLLM asks of insitu, by its arguments and by the headers it came with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from insitu.vllm.asked import Asked, asked_of
from insitu.vllm.http import extra_of

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def params(**extra: object) -> SimpleNamespace:
    return SimpleNamespace(extra_args=extra or None)


@pytest.mark.parametrize("told", ["capture=rows", "a=b, capture=rows"])
def test_rows_are_asked_for_by_argument(told: str) -> None:
    assert asked_of(params(insitu=told)) == Asked(capture=True)


@pytest.mark.parametrize("told", [None, "", "capture=everything", 1, ["capture=rows"]])
def test_anything_else_asks_for_nothing(told: object) -> None:
    asked = asked_of(params(insitu=told))
    assert not asked.capture and asked.trace is None
    assert asked_of(None) == asked_of(params()) == Asked()


def test_the_headers_of_a_server_come_as_arguments() -> None:
    headers = [(b"insitu", b"capture=rows"), (b"traceparent", PARENT.encode()), (b"accept", b"*/*")]
    asked = asked_of(SimpleNamespace(extra_args=extra_of(headers)))
    assert asked.capture and asked.trace is not None and asked.trace.trace_id == TRACE


def test_a_word_that_there_is_not_is_told_by_argument_and_by_header() -> None:
    told = "capture=everything is not known; it may be capture=rows"
    assert asked_of(params(insitu="capture=everything")) == Asked(wrong=told)
    assert asked_of(SimpleNamespace(extra_args=extra_of([(b"insitu", b"capture=everything")]))) == Asked(wrong=told)


def test_baggage_asks_as_well() -> None:
    extra = extra_of([(b"baggage", b"insitu=capture%3Drows"), (b"traceparent", PARENT.encode())])
    assert asked_of(SimpleNamespace(extra_args=extra)).capture


def test_headers_that_say_nothing_add_nothing() -> None:
    assert extra_of([(b"accept", b"*/*"), (b"insitu", b"a=b")]) is None


def test_a_trace_that_vllm_itself_passes_on_is_taken() -> None:
    trace = asked_of(params(), {"traceparent": PARENT}).trace
    assert trace is not None and trace.trace_id == TRACE
    assert asked_of(params(), {"traceparent": "none"}) == Asked()


def test_who_asks_for_rows_and_for_something_else_too_gets_the_rows() -> None:
    assert asked_of(params(insitu="capture=rows,capture=all")) == Asked(capture=True)
    headers = [(b"insitu", b"capture=rows"), (b"insitu", b"capture=all")]
    assert asked_of(SimpleNamespace(extra_args=extra_of(headers))) == Asked(capture=True)
