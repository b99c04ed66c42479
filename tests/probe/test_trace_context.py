"""W3C headers and OpenTelemetry's current span say where a request stands; what breaks the rules is counted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import insitu
from insitu.session.trace_context import bad_headers

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def newly_bad(headers: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]) -> dict[str, int]:
    before = bad_headers()
    insitu.request_context(headers)
    after = bad_headers()
    return {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}


@pytest.mark.parametrize(
    ("parent", "sampled"),
    [
        (PARENT, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # a flag of a later version beside it
        (f"  {PARENT}\t", True),
        (f"cc-{TRACE}-{SPAN}-01-what the future holds", True),
    ],
)
def test_a_traceparent_tells_trace_span_and_whether_it_is_sampled(parent: str, sampled: bool) -> None:
    found = insitu.request_context({"TraceParent": parent})
    assert (found.trace_id, found.span_id, found.sampled) == (TRACE, SPAN, sampled)
    assert found.traceparent == f"00-{TRACE}-{SPAN}-0{int(sampled)}"
    assert newly_bad({"traceparent": parent}) == {}


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01\n",
        f"cc-{TRACE}-{SPAN}-01.more",
        "٠" * 55,
    ],
)
def test_a_traceparent_that_breaks_the_rules_is_none_and_counted(parent: str) -> None:
    assert insitu.request_context({"traceparent": parent}) == insitu.RequestContext()
    assert newly_bad({"traceparent": parent, "tracestate": "a=b"}) == {"traceparent": 1}


def test_two_traceparents_are_none() -> None:
    pairs = [(b"traceparent", PARENT.encode()), (b"traceparent", PARENT.encode())]
    assert insitu.request_context(pairs).trace_id is None
    assert newly_bad(pairs) == {"traceparent": 1}


def test_without_headers_there_is_no_trace() -> None:
    for headers in (None, {}, {"accept": "text/html"}):
        found = insitu.request_context(headers)
        assert (found.trace_id, found.span_id, found.sampled, found.traceparent) == (None, None, None, "")


@pytest.mark.parametrize(
    ("states", "read"),
    [
        (["rojo=00f067aa0ba902b7, congo=t61rcWkgMzE"], "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (["a=1", "b=2"], "a=1,b=2"),
        (["tenant@vendor=x,,"], "tenant@vendor=x"),
        ([",".join(f"k{number}=v" for number in range(33))], None),
        (["a=1,a=2"], None),
        (["A=1"], None),
        (["a"], None),
        (["a=b=c"], None),
    ],
)
def test_a_tracestate_is_kept_whole_or_left_out(states: list[str], read: str | None) -> None:
    headers = [("traceparent", PARENT), *(("tracestate", state) for state in states)]
    found = insitu.request_context(headers)
    assert (found.trace_id, found.state) == (TRACE, read or "")
    assert newly_bad(headers) == ({} if read is not None else {"tracestate": 1})


def test_baggage_is_read_member_by_member_with_or_without_a_trace() -> None:
    headers = {"baggage": "user=al%20ice , insitu=capture=rows;ttl=3, bad member, =x, user=bob"}
    found = insitu.request_context(headers)
    assert found.baggage == {"user": "al ice", "insitu": "capture=rows"}
    assert found.trace_id is None
    assert newly_bad(headers) == {"baggage": 1}


def test_baggage_beyond_what_everybody_must_pass_on_is_left_out() -> None:
    many = {"baggage": ",".join(f"k{number}=v" for number in range(65))}
    assert len(insitu.request_context(many).baggage) == 64
    assert newly_bad(many) == {"baggage": 1}
    long = {"baggage": "a=b," + "c=" + "d" * 8192}
    assert insitu.request_context(long).baggage == {"a": "b"}
    assert newly_bad(long) == {"baggage": 1}


texts = st.text() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", fullmatch=True)
names = st.sampled_from(["traceparent", "tracestate", "baggage", "Baggage"]) | st.text()


@given(st.lists(st.tuples(names, texts | st.binary())))
def test_whatever_a_client_sends_nothing_is_raised(headers: list[tuple[str, str | bytes]]) -> None:
    found = insitu.request_context(headers)
    assert (found.trace_id is None) == (found.span_id is None) == (found.sampled is None)


@given(parent=texts, states=st.lists(st.text(st.sampled_from("ab=,@ 0"), max_size=12), max_size=3))
def test_it_reads_what_opentelemetry_reads(parent: str, states: list[str]) -> None:
    headers = {"traceparent": parent.strip("\n"), "tracestate": ",".join(states)}
    context = trace.get_current_span(TraceContextTextMapPropagator().extract(headers)).get_span_context()
    found = insitu.request_context(headers)
    assert (found.trace_id is not None) == context.is_valid
    if context.is_valid:
        assert (found.trace_id, found.span_id) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")
        assert found.sampled is context.trace_flags.sampled


def test_the_current_span_is_taken_where_headers_say_nothing_else() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("host")
    with tracer.start_as_current_span("server") as span:
        own = span.get_span_context()
        found = insitu.request_context()
        assert (found.trace_id, found.span_id) == (f"{own.trace_id:032x}", f"{own.span_id:016x}")
        assert found.sampled is True
        same = insitu.request_context({"traceparent": f"00-{own.trace_id:032x}-{SPAN}-00", "baggage": "a=b"})
        assert (same.span_id, same.sampled, same.baggage) == (f"{own.span_id:016x}", True, {"a": "b"})
        assert insitu.request_context({"traceparent": PARENT}).span_id == SPAN
        assert insitu.request_context({"traceparent": "nonsense"}).trace_id == found.trace_id


def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys, insitu\n"
        f"assert insitu.request_context({{'traceparent': '{PARENT}'}}).sampled\n"
        "heavy = {'opentelemetry', 'torch', 'pyarrow', 'grpc', 'numpy'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == "[]\n"
