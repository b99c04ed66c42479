"""Verdicts to alert about, and a real HTTP server that does what it is told; for the tests of alerts."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from insitu.vocabulary import VerdictKind
from insitu_collector.notify.alerts import Alert
from insitu_collector.verdicts.finding import Verdict


def verdict(name: str = "run-stuck-r1-1", revision: int = 0, state: str = "open", **changes: Any) -> Verdict:
    """A verdict of just now."""
    now = time.time_ns()
    row: dict[str, Any] = {
        "verdict": name,
        "revision": revision,
        "state": state,
        "kind": VerdictKind.STUCK,
        "on_stage": 1,
        "on_rank": 1,
        "layer": None,
        "site": None,
        "step_id": 7,
        "phase": "decode",
        "confidence": 1.0,
        "text": "rank 1 (stage 1) is stuck.",
        "remedy": "Look at its stack.",
        "window_start_unix_ns": now,
        "window_end_unix_ns": now,
        "detected_unix_ns": now,
        "num_requests": 2,
        "requests": ["a", "b"],
    }
    return Verdict(**(row | changes))


def alert(name: str = "run-stuck-r1-1", revision: int = 0, state: str = "open", **changes: Any) -> Alert:
    return Alert(verdict(name, revision, state, **changes))


def of_just_now(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Return the tables of a simulated run as if it had ended now: what opens in it is worth telling."""
    sources = tables["sources"]
    anchor = time.time_ns() - pc.max(tables["intervals"]["t1_ns"]).as_py()
    place = sources.schema.get_field_index("unix_anchor_ns")
    anchors = pa.array([anchor] * sources.num_rows, pa.int64())
    return tables | {"sources": sources.set_column(place, sources.schema.field(place), anchors)}


class Server:
    """Answers each POST with the next of `answers`, 200 when there is none; `got` has what came, in order."""

    def __init__(self, *answers: int | str) -> None:
        self.answers: Queue[int | str] = Queue()
        for answer in answers:
            self.answers.put(answer)
        self.got: Queue[dict[str, Any]] = Queue()
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.hanging = threading.Event()
        """Set once a request is being left without an answer."""
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw) if self.headers["Content-Type"] == "application/json" else {}
                server.paths.append(self.path)
                server.headers.append(dict(self.headers))
                answer = 200 if server.answers.empty() else server.answers.get()
                if isinstance(answer, str):
                    server.misbehave(answer, self.connection)
                    return
                self.send_response(answer)
                if answer in (302, 307):
                    self.send_header("Location", "/elsewhere")
                if answer == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                server.got.put(body | {"status": answer})

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up
        self.base = f"http://127.0.0.1:{self._http.server_port}"
        self.url = f"{self.base}/hook?token=secret"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def misbehave(self, how: str, connection: socket.socket) -> None:
        self.hanging.set()
        if how == "drip":  # a byte of the head now and then: no single read takes long
            line = b"HTTP/1.1 200 OK\r\n" + b"X-Slow: " + b"y" * 10_000
            for number in range(len(line)):
                if self.release.wait(0.02):
                    return
                connection.sendall(line[number : number + 1])
        elif how == "hang":
            self.release.wait()
        elif how == "garbage":
            connection.sendall(b"220 smtp.example.com ESMTP\r\n")
        else:
            assert how == "reset"
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def serving(*answers: int | str) -> Iterator[Server]:
    server = Server(*answers)
    try:
        yield server
    finally:
        server.close()
