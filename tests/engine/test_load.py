"""The load generator: what it plans follows from the seed, what it counts is what a server did."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from insitu_engine.load import load, percentiles, read_prompts
from insitu_engine.load_plan import MAX_TOKENS, endless, plan

seeds = st.integers(0, 2**32)


@given(seeds, st.floats(0.5, 50), st.floats(0.1, 20))
def test_a_plan_follows_from_its_seed_and_stays_in_its_time(seed: int, rate: float, seconds: float) -> None:
    planned = plan(seed, rate, seconds)
    assert planned == plan(seed, rate, seconds)
    times = [request.at_s for request in planned]
    assert times == sorted(times)
    assert all(0 < at_s < seconds for at_s in times)
    assert all(MAX_TOKENS[0] <= request.max_tokens <= MAX_TOKENS[1] for request in planned)
    assert all(request.prompt for request in planned)


def test_arrivals_come_at_the_rate_and_are_mixed() -> None:
    planned = plan(seed=1, rate=20, seconds=200)
    assert len(planned) == pytest.approx(4000, rel=0.05)
    assert sum(request.stream for request in planned) / len(planned) == pytest.approx(0.5, abs=0.05)
    assert sum(request.capture for request in planned) / len(planned) == pytest.approx(0.1, abs=0.03)
    lengths = {len(request.prompt.split()) for request in planned}
    assert min(lengths) < 4
    assert max(lengths) > 35


def test_another_seed_is_another_plan() -> None:
    assert plan(1, 5, 10) != plan(2, 5, 10)


def test_given_prompts_are_sent_whole(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one two\n\n three \n")
    assert {request.prompt for request in plan(0, 20, 10, read_prompts(file))} == {"one two", "three"}


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xfa"])
def test_a_file_without_prompts_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(click.ClickException, match=r"prompts\.txt"):
        read_prompts(file)


@given(st.lists(st.floats(0, 100), min_size=1))
def test_percentiles_are_values_in_order(values: list[float]) -> None:
    result = percentiles(values)
    assert set(result) == {"p50", "p95", "p99"}
    assert result["p50"] <= result["p95"] <= result["p99"]
    assert all(any(abs(value - seen) < 1e-3 for seen in values) for value in result.values())


Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


@contextmanager
def server(answer: Answer, seen: list[tuple[dict[str, Any], str | None]]) -> Iterator[str]:
    """Serve completions with `answer(body) -> (status, payload)`; `seen` gets each body and capture header."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, b'{"data": [{"id": "tiny"}]}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((body, self.headers.get("insitu")))
            self._reply(*answer(body))

        def _reply(self, status: int, payload: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


def run(url: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "insitu", "load", "--url", url, "--seconds", "0.5", "--rate", "60", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = ran.stdout.splitlines()
    assert len(lines) == 1
    document: dict[str, Any] = json.loads(lines[0])
    return document


def complete(body: dict[str, Any]) -> tuple[int, bytes]:
    """Answer as an OpenAI-shaped server would: as many tokens as asked for."""
    usage = {"completion_tokens": body["max_tokens"]}
    if not body.get("stream"):
        return 200, json.dumps({"choices": [{"text": "x"}], "usage": usage}).encode()
    events = [{"choices": [{"text": "x"}]}, {"choices": [], "usage": usage}]
    return 200, b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"


def test_what_is_sent_is_the_plan_and_what_is_counted_is_the_answer() -> None:
    seen: list[tuple[dict[str, Any], str | None]] = []
    with server(complete, seen) as url:
        document = run(url, "--seed", "5")
    planned = plan(5, 60, 0.5)
    sent = [(b["prompt"], b["max_tokens"], bool(b.get("stream")), header == "capture=rows") for b, header in seen]
    assert sorted(sent) == sorted((p.prompt, p.max_tokens, p.stream, p.capture) for p in planned)
    assert {body["model"] for body, _ in seen} == {"tiny"}
    assert (document["completed"], document["failed"]) == (len(planned), 0)
    assert document["tokens"] == sum(request.max_tokens for request in planned)
    assert document["latency_s"]["p50"] > 0


@given(seeds)
def test_a_closed_loop_draws_what_its_seed_says(seed: int) -> None:
    first, again = list(islice(endless(seed), 20)), list(islice(endless(seed), 20))
    assert first == again
    assert all(request.prompt and request.at_s == 0.0 for request in first)


def test_users_of_a_closed_loop_send_again_once_answered() -> None:
    """Never more than the users at once, and always as many, whatever a request takes."""
    at_once: list[int] = []
    lock, inside = Lock(), 0

    def slow(body: dict[str, Any]) -> tuple[int, bytes]:
        nonlocal inside
        with lock:
            inside += 1
            at_once.append(inside)
        enough.wait(0.02)
        with lock:
            inside -= 1
        return complete(body)

    enough = Event()
    seen: list[tuple[dict[str, Any], str | None]] = []
    with server(slow, seen) as url:
        command = [sys.executable, "-m", "insitu", "load", "--url", url, "--seconds", "0.5", "--concurrency", "3"]
        ran = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True, check=True)
    document = json.loads(ran.stdout)
    assert max(at_once) == 3
    assert document["completed"] == len(seen) > 6
    drawn = list(islice(endless(5), len(seen)))
    assert sorted(body["prompt"] for body, _ in seen) == sorted(request.prompt for request in drawn)


def test_a_user_does_not_run_against_a_server_that_refuses() -> None:
    seen: list[tuple[dict[str, Any], str | None]] = []
    with server(lambda body: (429, b'{"error": {"message": "the queue is full"}}'), seen) as url:
        command = [sys.executable, "-m", "insitu", "load", "--url", url, "--seconds", "0.5", "--concurrency", "2"]
        document = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (document["failed"], len(seen)) == (2, 2)


def test_a_rate_and_users_at_once_are_one_line() -> None:
    result = CliRunner().invoke(load, ["--url", "http://127.0.0.1:9", "--rate", "3", "--concurrency", "2"])
    assert result.exit_code == 2
    assert "give one of them" in result.output


def test_every_kind_of_failure_is_counted_with_its_reason() -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, bytes]:
        if body.get("stream"):
            return 200, b'data: {"choices": [{"text": "x"}]}\n\n'  # and then the server is gone
        return 429, b'{"error": {"message": "the queue is full"}}'

    seen: list[tuple[dict[str, Any], str | None]] = []
    with server(refuse, seen) as url:
        document = run(url)
    assert (document["completed"], document["failed"]) == (0, len(seen))
    assert sum(document["errors"].values()) == len(seen)
    assert set(document["errors"]) == {
        "ValueError: 429: the queue is full",
        "ValueError: the stream ended before its [DONE]",
    }


def test_no_server_is_one_line_with_the_remedy() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        result = CliRunner().invoke(load, ["--url", url, "--seconds", "1"])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: no server answers at {url}")
    assert result.output.count("\n") == 1
