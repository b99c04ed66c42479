"""A client of the OpenTelemetry SDK asks a pipeline: its trace arrives at a backend with what the ranks did for it.

From an exemplar of its latency it leads on to the tensors in the store. The backend is a receiver in this process, and
Arize Phoenix where that is installed (`make test-phoenix`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Final

import httpx
import numpy as np
import pytest
from live_system import ROOT, running
from otlp_kit import attributes
from phoenix_rig import Phoenix, phoenix
from target_kit import Receiver, grpc_target

from insitu_collector.store import open_store

pytestmark = pytest.mark.timeout(240)

EXAMPLE: Final = ROOT / "examples/08_client_trace.py"
PAGE: Final = ROOT / "docs/integrations.md"
PHOENIX: Final = ROOT / os.environ.get("PHOENIX", ".venv-phoenix") / "bin/python"
SERVE: Final = ["-m", "insitu", "serve", "--stages", "2"]
NUM_PROMPTS: Final = 3
NUM_TOKENS: Final = 4
WAIT_S: Final = 90.0


@dataclass(frozen=True)
class Told:
    """One span, as a backend has it."""

    trace: str
    span: str
    parent: str
    """The span above it in its trace, "" for none."""
    name: str
    attributes: dict[str, Any]
    steps: frozenset[int]
    """That its events name."""


@dataclass(frozen=True)
class Asked:
    """What a client did, and the store it went into."""

    traces: tuple[str, ...]
    """One a prompt, as the client printed them."""
    spans: list[Told]
    """What the backend had in the end."""
    store: Path


def of_receiver(receiver: Receiver) -> list[Told]:
    return [
        Told(
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.name,
            attributes(span) | {"links": {link.trace_id.hex() for link in span.links}},
            frozenset(attributes(event)["insitu.step"] for event in span.events if event.attributes),
        )
        for span in receiver.spans()
    ]


def of_phoenix(backend: Phoenix) -> list[Told]:
    """Ask Phoenix's API for all spans it has."""
    found: list[Told] = []
    cursor: dict[str, str] = {}
    while True:
        asked: dict[str, str] = {"limit": "1000", **cursor}
        answer = httpx.get(f"{backend.url}/v1/projects/default/spans", params=asked, timeout=30)
        if answer.status_code == 404:  # a project begins with its first span
            return []
        page = answer.raise_for_status().json()
        for span in page["data"]:
            steps = (event["attributes"].get("insitu.step") for event in span["events"])
            named = frozenset(step for step in steps if step is not None)
            ids = span["context"]["trace_id"], span["context"]["span_id"], span["parent_id"] or ""
            found.append(Told(*ids, span["name"], span["attributes"], named))
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}


def of_trace(spans: Sequence[Told], trace: str) -> dict[str, Told]:
    return {span.name: span for span in spans if span.trace == trace}


def computed(spans: Sequence[Told], step: int) -> list[Told]:
    return [span for span in spans if span.name == "insitu.compute" and span.attributes["insitu.step"] == step]


def is_whole(spans: Sequence[Told], traces: Sequence[str]) -> bool:
    """Return whether each trace has its client and its request, and each step that it names a span of both ranks."""
    for trace in traces:
        own = of_trace(spans, trace)
        if not {"ask the model", "text_completion tiny-llama"} <= set(own):
            return False
        steps = own["text_completion tiny-llama"].steps
        if not steps or any(
            {span.attributes["insitu.rank"] for span in computed(spans, step)} != {0, 1} for step in steps
        ):
            return False
    return True


def asked(folder: Path, to: str, spans: Callable[[], list[Told]]) -> Asked:
    """Run the example against a pipeline whose collector sends on to a backend, until the backend has all of it."""
    with running(folder, SERVE, collect_options=["--otlp-to", to]) as system:
        told = {"OTEL_EXPORTER_OTLP_ENDPOINT": system.to.replace("grpc://", "http://")}
        command = [sys.executable, str(EXAMPLE), "--url", system.url, "--max-tokens", str(NUM_TOKENS)]
        done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        traces = tuple(re.findall(r"^([0-9a-f]{32}) '", done.stdout, re.MULTILINE))
        pause, deadline = Event(), time.monotonic() + WAIT_S
        while not is_whole(found := spans(), traces) and time.monotonic() < deadline:
            pause.wait(0.2)
    return Asked(traces, found, system.store)


@contextmanager
def environment(**told: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("OTEL_"):
                patch.delenv(name)
        for name, value in told.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """What a receiver in this process got."""
    with environment(), grpc_target() as receiver:
        yield asked(tmp_path_factory.mktemp("received"), receiver.url, lambda: of_receiver(receiver))


def check(found: Asked) -> None:
    """Hold what arrived against what docs/otel.md promises."""
    assert len(set(found.traces)) == NUM_PROMPTS
    assert is_whole(found.spans, found.traces), found.spans
    for trace in found.traces:
        own = of_trace(found.spans, trace)
        client, request = own["ask the model"], own["text_completion tiny-llama"]
        assert (client.parent, request.parent) == ("", client.span)
        assert request.attributes["gen_ai.operation.name"] == "text_completion"
        assert request.attributes["gen_ai.request.model"] == "tiny-llama"
        assert request.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
        for step in request.steps:
            ranks = computed(found.spans, step)
            assert len({span.trace for span in ranks}) == 1, "all ranks' spans of a step are one trace"
            assert {(span.attributes["insitu.rank"], span.attributes["insitu.stage"]) for span in ranks} == {
                (0, 0),
                (1, 1),
            }


def test_a_clients_trace_arrives_with_its_request_and_with_what_each_rank_did(received: Asked) -> None:
    check(received)


def test_live_a_rank_s_span_links_to_each_request_it_served_or_is_counted(received: Asked) -> None:
    (cursor,) = (received.store / "v1" / "forward").glob("*.json")
    num_unlinked = json.loads(cursor.read_text())["account"]["unlinked"]
    named = [
        (trace, step)
        for trace in received.traces
        for step in of_trace(received.spans, trace)["text_completion tiny-llama"].steps
    ]
    spans = [(trace, span) for trace, step in named for span in computed(received.spans, step)]
    without = [span for trace, span in spans if trace not in span.attributes["links"]]
    assert len(spans) > NUM_PROMPTS and len(without) <= num_unlinked


def test_from_a_store_that_is_whole_each_rank_links_to_the_requests_it_served(received: Asked) -> None:
    with environment(), grpc_target() as receiver:
        command = ["-m", "insitu", "subscribe", str(received.store), "--to", receiver.url, "--once"]
        subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=120)
        spans = of_receiver(receiver)
    for trace in received.traces:
        for step in of_trace(spans, trace)["text_completion tiny-llama"].steps:
            ranks = computed(spans, step)
            assert {span.attributes["insitu.rank"] for span in ranks} == {0, 1}
            assert all(trace in span.attributes["links"] for span in ranks)


def test_an_exemplar_of_the_clients_latency_leads_to_a_tensor(received: Asked, tmp_path: Path) -> None:
    (query,) = re.findall(r"```python\n(# From an exemplar.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "insitu-store").symlink_to(received.store)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        found: dict[str, Any] = {}
        exec(query, found)
    assert found["trace_id"] in received.traces
    assert set(found["by_rank"].to_pydict()["rank"]) == {0, 1}
    store = open_store(received.store)
    captured = store.tensors(found["request"], "L3.resid_post")["L3.resid_post"]
    assert found["tensor"].shape == (len(captured.positions), 192) and not captured.missing
    assert np.isfinite(found["tensor"]).all()
    (row,) = [
        row for row in store.table("requests").to_pylist() if row["request"] == found["request"] and row["event"] == 0
    ]
    client = of_trace(received.spans, found["trace_id"])["ask the model"]
    assert (row["trace_id"], row["parent_span_id"], row["sampled"]) == (client.trace, client.span, True)
    assert found["steps"]["step_id"].to_pylist() == sorted(
        {row["step_id"] for row in store.captures(request=found["request"], site="L3.resid_post").to_pylist()}
    )


@pytest.mark.soak
@pytest.mark.skipif(not PHOENIX.exists(), reason="Phoenix is not installed; `make test-phoenix` installs it")
def test_phoenix_has_the_same_but_for_links_and_resources(tmp_path: Path) -> None:
    with (
        environment(OTEL_METRICS_EXPORTER="none", OTEL_LOGS_EXPORTER="none"),
        phoenix(PHOENIX, tmp_path / "px") as backend,
    ):
        found = asked(tmp_path, f"grpc://{backend.address}", lambda: of_phoenix(backend))
        check(found)
    named = {name for span in found.spans for name in span.attributes}
    kept = sorted(name for name in named if name.startswith(("links", "dist.", "service.", "host.")))
    assert kept == [], "docs/integrations.md says that Phoenix keeps neither links nor resources"
