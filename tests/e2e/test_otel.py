"""A client's `traceparent` reaches the table `requests` and the spans of the steps that served it, on every rank."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from live_system import MODEL, Process, running
from otlp_kit import Inbox, attributes, grpc_receiver

from insitu_collector.store import open_store

pytestmark = pytest.mark.timeout(120)

SERVE = ["-m", "insitu", "serve", "--stages", "2"]
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OTHER = "5bf92f3577b34da6a3ce929d0e0e4736"


def complete(url: str, **headers: str) -> None:
    body = {"model": MODEL.name, "prompt": "Once there was", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()


def test_a_traceparent_reaches_the_requests_table(tmp_path: Path) -> None:
    with running(tmp_path, SERVE) as system:
        complete(system.url, traceparent=f"00-{TRACE}-{SPAN}-01", baggage="insitu=capture=rows")
        complete(system.url, traceparent=f"00-{OTHER}-{SPAN[::-1]}-00")
        complete(system.url, traceparent=f"00-{TRACE}-{SPAN[:-1]}-01")
    requests = open_store(system.store).table("requests").to_pylist()
    arrived = [(row["trace_id"], row["parent_span_id"], row["sampled"]) for row in requests if row["event"] == 0]
    assert set(arrived) == {(TRACE, SPAN, True), (OTHER, SPAN[::-1], False), (None, None, None)}
    (driver,) = [source for source in system.sources if source.get("role") == "driver"]
    assert driver["bad_headers"] == {"traceparent": 1}


def served(inbox: Inbox) -> dict[int, set[str]]:
    """Return the trace ids that compute spans link to, by rank."""
    found: dict[int, set[str]] = {}
    for span in inbox.spans():
        if span.name == "insitu.compute":
            found.setdefault(attributes(span)["insitu.rank"], set()).update(link.trace_id.hex() for link in span.links)
    return found


def test_spans_of_each_rank_link_to_the_request_they_served() -> None:
    with grpc_receiver() as inbox:
        command = [*SERVE, "--model", str(MODEL), "--port", "0", "--to", f"otlp://{inbox.target}"]
        engine = Process(command, {"OTEL_TRACES_SAMPLER": "parentbased_always_off"})
        try:
            url = engine.wait_for(r"ready on (http://[\w.:]+)")[1]
            complete(url, traceparent=f"00-{TRACE}-{SPAN}-01")
            complete(url, traceparent=f"00-{OTHER}-{SPAN}-00")
            complete(url)
        finally:
            engine.stop()
        assert engine.process.returncode == 0, engine.lines
        (request,) = [span for span in inbox.spans() if span.name == f"text_completion {MODEL.name}"]
        assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, SPAN)
        assert attributes(request)["gen_ai.usage.output_tokens"] == 4
        assert served(inbox) == {0: {TRACE}, 1: {TRACE}}
        steps: dict[int, dict[int, bytes]] = {0: {}, 1: {}}
        for span in inbox.spans():
            if span.name == "insitu.compute":
                told = attributes(span)
                steps[told["insitu.rank"]][told["insitu.step"]] = span.trace_id
        assert steps[0] == steps[1]  # one trace a step, without a word between the ranks
        assert len(steps[0]) == 4
