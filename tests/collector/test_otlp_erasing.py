"""What is erased of what came by OTLP goes, and what others share with it stays with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from otlp_in_kit import collecting, normal, spans

from insitu.identity import Source
from insitu.segments.erasure import Erased, Erasure, Kind, digest
from insitu_collector.keeping.erasing import erase_from, rewrite_now, would_erase
from insitu_collector.keeping.orders import NothingKnown
from insitu_collector.keeping.recorder import Recorder
from insitu_collector.otlp.decoding import decode
from insitu_collector.otlp.reading import requests_of
from insitu_collector.otlp.receiver import Encoded
from insitu_collector.otlp.signals import TRACES
from insitu_collector.store import open_store

SALT = b"salt"


def without(request: Any, *gone: int) -> Any:
    """Return a copy of a request of one scope without some of its spans."""
    left = TRACES.request()
    left.CopyFrom(request)
    kept = left.resource_spans[0].scope_spans[0].spans
    for place in sorted(gone, reverse=True):
        del kept[place]
    return left


@pytest.mark.parametrize("gone", [(0,), (0, 1), (1,), (0, 2), (3,)])
@pytest.mark.parametrize("deep", [False, True])
def test_spans_keep_their_resource_when_the_one_that_had_it_is_erased(gone: tuple[int, ...], deep: bool) -> None:
    request, other = spans(4), spans(2, seed=9)
    both = TRACES.request()
    both.MergeFrom(request)
    both.MergeFrom(other)
    batch = decode(TRACES, both.SerializeToString()).columns("").batch(Source(epoch=7), 40)
    of_gone = [request.resource_spans[0].scope_spans[0].spans[place].trace_id.hex() for place in gone]
    traces = tuple(digest(SALT, trace) for trace in of_gone)
    erased = Erased(SALT, [Erasure(Kind.REQUEST, digest(SALT, "r"), 0, 0, "", traces)])
    left = erased.left("spans", 7, batch, deep=deep)
    expected = without(request, *gone)
    expected.MergeFrom(other)
    assert [normal(each) for each in requests_of(TRACES, [left])] == [normal(expected)]


def test_a_resource_of_which_no_span_is_left_goes_too() -> None:
    request = spans(1)
    batch = decode(TRACES, request.SerializeToString()).columns("").batch(Source(epoch=7), 0)
    trace = digest(SALT, request.resource_spans[0].scope_spans[0].spans[0].trace_id.hex())
    erased = Erased(SALT, [Erasure(Kind.REQUEST, digest(SALT, "r"), 0, 0, "", (trace,))])
    assert erased.left("spans", 7, batch).num_rows == 0


def test_what_a_tenant_sent_is_erased_with_it_and_nobody_elses(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with collecting(store) as (server, _, _):
        assert server.otlp is not None
        for tenant, seed in (("acme", 1), ("other", 2), ("", 3)):
            server.otlp._receiver.receive(TRACES, Encoded(spans(2, seed=seed).SerializeToString()), tenant)
    with pytest.raises(NothingKnown):
        would_erase(store, Kind.TENANT, "nobody")
    with Recorder(store) as recorder:
        assert erase_from(store, Kind.TENANT, "acme", recorder, within_s=0.0).gone == {"spans": 2}
        assert open_store(store).table("spans")["tenant"].to_pylist() == ["other"] * 2 + [None] * 2
        assert rewrite_now(store, recorder, 30.0) == []
    assert [normal(each) for each in open_store(store).otlp("spans")] == [normal(spans(2, seed=s)) for s in (2, 3)]
    held = b"".join(file.read_bytes() for file in store.rglob("spans/*.arrow"))
    ids = [span.span_id for span in spans(2, seed=1).resource_spans[0].scope_spans[0].spans]
    assert not any(each in held for each in ids), "gone from the files"
    with collecting(store) as (server, _, _):
        assert server.otlp is not None
        server.otlp._receiver.receive(TRACES, Encoded(spans(1, seed=4).SerializeToString()), "acme")
    assert open_store(store).table("spans")["tenant"].to_pylist().count("acme") == 1, "what it sends later is new"
