"""The rig of the dashboard's cost: a system under load, viewers of its streams, and a browser with the page alone."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from insitu_collector.views.spans import CLASSES
from insitu_dashboard.components import script_of, style
from insitu_engine.processes import Children

READY_S: Final = 90.0
CHROMIUM: Final = Path("/usr/bin/chromium")
STREAM: Final = "/api/live?spans=1"
"""What a Pipeline page opens: pictures at 1 Hz and spans at up to 4 Hz, so the dearer of the two pages."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")
NUM_LANES: Final = 8
SPAN_HZ: Final = 4


def cpu_s(pid: int) -> float:
    """Return the CPU-seconds that a process has used, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@dataclass(frozen=True)
class System:
    """A served model that is observed, a collector with its judge, a dashboard."""

    children: Children
    server: str
    dashboard: str
    dashboard_pid: int

    def load(self, seconds: float, rate: float, seed: int) -> dict[str, Any]:
        """Return what `insitu load` says of that many seconds of requests."""
        arguments = ["load", "--url", self.server, "--seconds", str(seconds), "--rate", str(rate), "--seed", str(seed)]
        child = self.children.start("insitu load", [*arguments, "--quiet"], vital=False)
        child.process.wait(timeout=seconds + READY_S)
        child.join()
        if child.process.returncode:
            raise child.failure()
        found: dict[str, Any] = json.loads(child.stdout[-1])
        return found


@contextmanager
def system(folder: Path, stages: int) -> Iterator[System]:
    """Run all of it for as long as the context lasts. Raises ChildFailed."""
    with Children() as children:

        def started(name: str, arguments: list[str], pattern: str) -> tuple[str, int]:
            child = children.start(f"insitu {name}", [name, *arguments, "--port", "0"])
            return child.wait_for_line(pattern, READY_S, children.interrupted)[1], child.process.pid

        store = folder / "store"
        to, _ = started("collect", ["--store", str(store), "--judge"], r"collecting on (\S+) into")
        server, _ = started("serve", ["--stages", str(stages), "--to", to], r"ready on (http://[\w.:]+)")
        dashboard, pid = started("dashboard", [str(store)], r"dashboard on (http://\S+)")
        yield System(children, server, dashboard, pid)
        children.check()


@contextmanager
def viewers(address: str, count: int) -> Iterator[list[int]]:
    """Hold `count` streams open, each read and thrown away; yields the bytes that each has got so far."""
    found = urlsplit(address)
    got = [0] * count
    request = f"GET {STREAM} HTTP/1.1\r\nHost: {found.netloc}\r\nAccept: text/event-stream\r\n\r\n".encode()

    def read(place: int, connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            got[place] += len(data)

    with ExitStack() as stack:
        for place in range(count):
            connection = stack.enter_context(socket.create_connection((found.hostname or "", found.port or 80), 10))
            connection.settimeout(None)
            connection.sendall(request)
            thread = threading.Thread(target=read, args=(place, connection), daemon=True)
            thread.start()
            stack.callback(thread.join, 5.0)
            stack.callback(connection.shutdown, socket.SHUT_RDWR)
        yield got


# -- the page alone, in a browser, fed with made spans -----------------------------------------------------------------

PAGE: Final = """<!doctype html><meta charset="utf-8"><body><div id="host"></div><script type="module">
window.longTasks = [];
new PerformanceObserver((list) => list.getEntries().forEach((entry) => window.longTasks.push(entry.duration)))
  .observe({ entryTypes: ["longtask"] });
const { default: mount } = await import("/page.js");
const parentElement = document.getElementById("host");
const data = { stream: "/live", spans_url: "", picture: null, spans: null, view: null, selected: null, paused: false,
  filter: {}, window_s: 10 };
mount({ parentElement, key: "", name: "", setStateValue() {}, setTriggerValue() {}, data });
window.page = parentElement.insituPage;
</script>"""


TIMED_DRAWS: Final = """
() => [...Array(20)].map(() => {
  const begun = performance.now();
  page.draw();
  return performance.now() - begun;
})
"""


def made_spans(number: int, count: int, base_ns: int) -> dict[str, Any]:
    """Return document `number` of a stream: `count` spans over all lanes, end to end, of a quarter second."""
    quarter_us = 1e6 / SPAN_HZ
    each = count // NUM_LANES
    places = [(lane, place) for place in range(each) for lane in range(NUM_LANES)]
    return {
        "schema": "insitu.spans/1",
        "base": str(base_ns),
        "reset": number == 0,
        "lanes": [{"stage": lane, "rank": lane} for lane in range(NUM_LANES)],
        "classes": [str(cls) for cls in CLASSES],
        "lane": [lane for lane, _ in places],
        "t0_us": [number * quarter_us + place * quarter_us / each for _, place in places],
        "us": [quarter_us / each] * len(places),
        "cls": [(place + lane) % len(CLASSES) for lane, place in places],
        "step": [number] * len(places),
        "mb": [place % 4 for _, place in places],
        "peer": [0] * len(places),
        "merged": [1] * len(places),
        "open": [],
        "until_us": (number + 1) * quarter_us,
        "gaps": [],
        "since": str(base_ns),
    }


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, num_spans: int, *arguments: Any) -> None:
        self.num_spans = num_spans
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/live":
            return self._stream()
        kind, text = ("text/javascript", script_of("pipeline")) if self.path == "/page.js" else ("text/html", PAGE)
        if self.path == "/":
            text = f"<style>{style()}</style>{text}"
        return self._answer(kind, text.encode())

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        base, due, pause = time.time_ns(), time.monotonic(), threading.Event()
        try:
            for number in range(1 << 30):
                text = json.dumps(made_spans(number, self.num_spans, base))
                self.wfile.write(f"event: spans\ndata: {text}\n\n".encode())
                due += 1 / SPAN_HZ
                pause.wait(max(0.0, due - time.monotonic()))
        except OSError:
            pass  # the page was closed


@dataclass(frozen=True, slots=True)
class Browsed:
    """What a browser did while spans came."""

    num_messages: int
    num_spans: int
    """Held at the end."""
    longest_task_ms: float
    num_long_tasks: int
    """Over 50 ms, by the browser's own measure."""
    draw_ms: float
    """Median of twenty drawings of all that is held."""


def browse(num_spans: int, messages: int) -> Browsed:
    """Show the Pipeline page in a headless browser while `num_spans` spans come four times a second."""
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, num_spans))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("() => window.page && page.numTicks >= 4")  # what loading cost is not asked for
        page.evaluate("longTasks.length = 0")
        begun = page.evaluate("page.numTicks")
        page.wait_for_function(f"() => page.numTicks >= {begun + messages}", timeout=messages * 1000)
        tasks = page.evaluate("longTasks")
        draws = page.evaluate(TIMED_DRAWS)
        held = page.evaluate("page.panel.store.size")
        chromium.close()
        server.shutdown()
    return Browsed(messages, held, max(tasks, default=0.0), len(tasks), sorted(draws)[len(draws) // 2])
