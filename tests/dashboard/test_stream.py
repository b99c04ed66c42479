"""`insitu dashboard` as a process: its address, its streams, what it refuses, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from reached_kit import Reached

from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import write_store

COMMAND = [sys.executable, "-m", "insitu", "dashboard"]


class Server:
    """A dashboard process that has said its address."""

    def __init__(self, store: Path | str, *options: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, str(store), "--port", "0", *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("dashboard on http://"), line
        self.url = line.split()[-1]

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=20)

    def num_streams(self) -> int:
        return int(self.get("/api/status").json()["streams"])


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    found = Server(store)
    yield found
    found.process.send_signal(signal.SIGTERM)
    stdout, stderr = found.process.communicate(timeout=20)
    assert (found.process.returncode, stdout, stderr) == (0, "", "")


def events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def loaded(stream: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Return the events from the first on that was made after the store was read."""
    return dropwhile(lambda event: event[0] == "picture" and event[1]["header"]["state"] == "loading", stream)


def test_pictures_and_spans_come_as_events(server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/api/live?spans=1&win=300", timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = loaded(events(response))
        found = dict(islice(stream, 2))
        assert server.num_streams() == 1
    assert found["picture"]["schema"] == "insitu.picture/1"
    assert len(found["picture"]["latency"]["unix_s"]) == 300
    assert found["spans"]["reset"] is True


def test_a_stream_that_is_left_is_closed(server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/api/live", timeout=20) as response:
        next(events(response))
    counts = iter(server.num_streams, 0)
    for _, _ in zip(counts, range(500), strict=False):
        pass
    assert server.num_streams() == 0


def test_a_window_of_spans_is_asked_for_by_time(server: Server) -> None:
    with httpx.stream("GET", f"{server.url}/api/live?spans=1", timeout=20) as response:
        spans = dict(islice(loaded(events(response)), 2))["spans"]
    base = int(spans["base"])
    found = server.get(f"/api/spans?t0={base}&t1={base + 10**9}&px=100").json()
    assert found["schema"] == "insitu.spans/1"
    assert 0 < len(found["lane"]) <= len(spans["lane"])


@pytest.mark.parametrize("query", ["", "t0=1", "t0=5&t1=4", "t0=a&t1=b", "t0=1&t1=99999999999999999"])
def test_a_window_that_is_none_is_refused(server: Server, query: str) -> None:
    found = server.get(f"/api/spans?{query}")
    assert found.status_code == 400
    assert "Unix nanoseconds" in found.text


def test_an_unknown_run_has_no_spans(server: Server) -> None:
    assert server.get("/api/spans?t0=1&t1=2&run=ffff").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Host": "evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
@pytest.mark.parametrize("path", ["/api/live", "/api/spans?t0=1&t1=2", "/api/status"])
def test_pages_of_other_sites_get_nothing(server: Server, path: str, headers: dict[str, str]) -> None:
    assert server.get(path, **headers).status_code == 403


def test_streamlit_serves_the_pages_beside_them(server: Server) -> None:
    assert "<html" in server.get("/").text
    assert server.get("/_stcore/health").text == "ok"


def test_it_ends_at_once_with_a_stream_open(store: Path, reached: Reached) -> None:
    server = Server(reached(store))
    with httpx.stream("GET", f"{server.url}/api/live", timeout=20) as response:
        stream = events(response)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        _, stderr = server.process.communicate(timeout=10)
    assert (server.process.returncode, stderr) == (0, "")


def test_what_is_written_comes_live(tables: dict[str, pa.Table], tmp_path: Path, reached: Reached) -> None:
    parts, seqs = list(seconds(tables)), dict[tuple[int, str], int]()
    write_store(parts[0], str(tmp_path), seqs=seqs)
    server = Server(reached(tmp_path))
    with httpx.stream("GET", f"{server.url}/api/live?spans=1", timeout=20) as response:
        spans = (event for name, event in loaded(events(response)) if name == "spans")
        assert next(spans)["reset"] is True
        write_store(parts[1], str(tmp_path), seqs=seqs)
        new = next(spans)
        assert (new["reset"], len(new["lane"])) == (False, parts[1]["intervals"].num_rows)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.communicate(timeout=20)[1] == ""


def refused(*arguments: str) -> str:
    ran = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    (line,) = ran.stderr.splitlines()
    return line


def test_a_port_in_use_is_one_line(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in refused(str(store), "--port", str(port))


def test_a_store_that_is_none_is_one_line(tmp_path: Path) -> None:
    assert "no store at" in refused(str(tmp_path))


def test_an_address_that_is_none_of_ours_is_one_line(store: Path) -> None:
    assert "cannot listen on 203.0.113.7" in refused(str(store), "--host", "203.0.113.7")
