"""A message is cut where protobuf itself would cut it, and nothing that is none gets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span

from insitu_collector.otlp.wire import Malformed, TooMany, cut, entry

NUMBER = 2


@given(st.lists(st.binary(max_size=300), max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_a_cut_message_holds_each_entry_as_it_came(names: list[bytes], scope: str, url: str) -> None:
    message = ScopeSpans(schema_url=url, spans=[Span(trace_id=name) for name in names])
    message.scope.name = scope
    data = message.SerializeToString()
    rest, places = cut(data, (0, len(data)), NUMBER, 100)
    assert [data[begin:end] for begin, end in places] == [span.SerializeToString() for span in message.spans]
    others = ScopeSpans.FromString(rest)
    assert (others.scope.name, others.schema_url, len(others.spans)) == (scope, url, 0)


@given(st.binary(max_size=20_000))
def test_an_entry_is_read_by_protobuf_as_what_it_holds(content: bytes) -> None:
    assert list(cut(entry(NUMBER, content), (0, len(entry(NUMBER, content))), NUMBER, 1)[1]) != []
    data = entry(1, entry(1, b"name") + entry(3, b"")) + entry(NUMBER, entry(1, content))
    assert ScopeSpans.FromString(data).spans[0].trace_id == content


def test_fields_of_every_wire_type_that_nobody_knows_are_kept() -> None:
    unknown = b"\xf8\x01\x96\x01" + b"\xf9\x01" + bytes(8) + b"\xfa\x01\x03abc" + b"\xfd\x01" + bytes(4)
    data = unknown + entry(NUMBER, b"") + unknown
    rest, places = cut(data, (0, len(data)), NUMBER, 100)
    assert rest == unknown * 2
    assert places == [(len(unknown) + 2, len(unknown) + 2)]


def test_a_tag_and_a_size_written_in_more_bytes_than_needed_are_understood() -> None:
    data = b"\x92\x00" + b"\x83\x80\x00" + b"abc"
    rest, places = cut(data, (0, len(data)), NUMBER, 1)
    assert (rest, [data[begin:end] for begin, end in places]) == (b"", [b"abc"])


@pytest.mark.parametrize(
    "data",
    [
        b"\x12",  # a tag and nothing
        b"\x12\x05abc",  # shorter than it says
        b"\x12\xff\xff\xff\xff\x0f",  # 4 GiB
        b"\x12" + b"\xff" * 11,  # a size that does not end
        b"\x08",  # a number that is not there
        b"\x09\x00",  # 8 bytes that are not there
        b"\x0b\x0c",  # a group, which protobuf 3 has not
        b"\x1f\x8b\x08",  # gzip
        b"\x02\x00",  # field 0
        b"\xf8\xff\xff\xff\x1f\x00",  # a tag of over 32 bits
        b"\xf8\x81\x80\x80\x80\x00\x00",  # a tag in six bytes
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        cut(data, (0, len(data)), NUMBER, 100)


def test_an_entry_must_not_reach_beyond_what_holds_it() -> None:
    data = entry(NUMBER, b"abcd")
    with pytest.raises(Malformed):
        cut(data + b"more", (0, len(data) - 1), NUMBER, 1)


def test_it_stops_as_soon_as_there_are_too_many() -> None:
    data = entry(NUMBER, b"") * 5
    assert len(cut(data, (0, len(data)), NUMBER, 5)[1]) == 5
    with pytest.raises(TooMany):
        cut(data, (0, len(data)), NUMBER, 4)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_cut_or_refused(data: bytes) -> None:
    try:
        rest, places = cut(data, (0, len(data)), NUMBER, 100)
    except Malformed:
        return
    assert len(rest) + sum(end - begin for begin, end in places) <= len(data)
    assert all(0 <= begin <= end <= len(data) for begin, end in places)
