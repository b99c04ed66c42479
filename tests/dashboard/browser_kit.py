"""A pipeline's records, sent in real time to a real collector with its judge; a dashboard over that store; a browser.

Only the engine is left out: its records come from `insitu_collector.simulate`, moved to now, through the exporters that
probes use.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import pyarrow as pa
import pyarrow.compute as pc
from live_system import Process

from insitu.exporters.base import Batch, Retry
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM: Final = Path("/usr/bin/chromium")
MARKUP: Final = "<img src=x onerror=window.wasRun=1>"
"""As a name: shown as these characters, or it runs."""
PIECE_NS: Final = SECOND // 4
HISTORY_S: Final = 30
FAULTY: Final = Scenario(
    seed=3,
    seconds=240.0,
    faults=(Fault("slow", 6.0, 1, ms=20.0), Fault("nan", 20.0, 1, layer=2)),
)
"""Stage 1 computes longer from 6 s on, and one step of it has a value that is not finite."""
FIND_ROOT: Final = """
window.longTasks = [];
new PerformanceObserver((list) => list.getEntries().forEach((entry) => window.longTasks.push(entry.duration)))
  .observe({ entryTypes: ["longtask"] });
window.insituRoot = () => {
  for (const node of document.querySelectorAll("*")) {
    const found = node.shadowRoot && node.shadowRoot.querySelector(".insitu-root");
    if (found) return found;
  }
  return null;
};
"""


def with_markup(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """Return tables whose model, sites and requests have names that a careless page would run."""
    sources, sites, requests, steps = (tables[name] for name in ("sources", "sites", "requests", "steps"))
    marked_sites = pc.replace_substring(sites["name"], "mlp_out", f"mlp_out{MARKUP}")
    marked_requests = pc.replace_substring(requests["request"], "req-", f"req-{MARKUP}-")
    models = pa.array([MARKUP] * sources.num_rows, sources.schema.field("model").type)
    return tables | {
        "sources": _replaced(sources, "model", models),
        "sites": _replaced(sites, "name", marked_sites),
        "requests": _replaced(requests, "request", marked_requests),
        "steps": _replaced(steps, "rows", _with_marked_requests(steps["rows"].combine_chunks())),
    }


def _replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), values.cast(table.schema.field(place).type))


def _with_marked_requests(rows: Any) -> Any:
    rows = rows.chunk(0) if isinstance(rows, pa.ChunkedArray) else rows
    entries = rows.values
    names = [field.name for field in entries.type]
    columns = {name: entries.field(name) for name in names}
    columns["request"] = pc.replace_substring(columns["request"], "req-", f"req-{MARKUP}-")
    marked = pa.StructArray.from_arrays([columns[name].cast(entries.type.field(name).type) for name in names], names)
    return pa.ListArray.from_arrays(rows.offsets, marked, mask=rows.is_null())


class Feeder(threading.Thread):
    """Sends tables to a collector so that the record of now is written now; the first `HISTORY_S` at once."""

    def __init__(self, address: str, tables: dict[str, pa.Table]) -> None:
        super().__init__(name="feed records", daemon=True)
        self.begin_ns = int(pc.min(tables["intervals"]["t0_ns"]).as_py())
        self.began_unix_ns = time.time_ns() - HISTORY_S * SECOND
        anchor = pa.array(
            [self.began_unix_ns - self.begin_ns] * 3, tables["sources"].schema.field("unix_anchor_ns").type
        )
        self._tables = tables | {"sources": _replaced(tables["sources"], "unix_anchor_ns", anchor)}
        self._target = address.removeprefix("grpc://")
        self._exporters: dict[int, CollectorExporter] = {}
        self._seqs: dict[tuple[int, str], int] = {}
        self._stop_sending = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            for number, part in enumerate(seconds(self._tables, PIECE_NS)):
                due_unix_ns = self.began_unix_ns + (number + 1) * PIECE_NS
                self._stop_sending.wait(max(0, due_unix_ns - time.time_ns()) / 1e9)
                if self._stop_sending.is_set():
                    return
                self._send(part)
        except BaseException as error:
            self.problem = error

    def _send(self, tables: dict[str, pa.Table]) -> None:
        for name, rows in tables.items():
            for epoch in rows["epoch"].unique().to_pylist():
                mine = rows.filter(pc.equal(rows["epoch"], pa.scalar(epoch, pa.uint64()))).combine_chunks()
                for data in mine.to_batches():
                    seq = self._seqs.get((epoch, name), 0)
                    self._seqs[epoch, name] = seq + 1
                    self._export(Batch(epoch, seq, data, name))

    def _export(self, batch: Batch) -> None:
        exporter = self._exporters.get(batch.epoch)
        if exporter is None:
            exporter = self._exporters[batch.epoch] = CollectorExporter(self._target, Source(epoch=batch.epoch))
        while not self._stop_sending.is_set():
            try:
                exporter.export(batch)
                return
            except Retry as again:
                self._stop_sending.wait(again.after_s)

    def stop(self) -> None:
        """Stop sending and hang up."""
        self._stop_sending.set()
        self.join(10)
        for exporter in self._exporters.values():
            exporter.close(1.0)
        assert self.problem is None, self.problem


@dataclass(frozen=True)
class Running:
    """A collector that is being fed and a dashboard over its store."""

    store: Path
    url: str
    collector: Process
    dashboard: Process
    feeder: Feeder

    def num_streams(self) -> int:
        return int(httpx.get(f"{self.url}/api/status", timeout=20).json()["streams"])

    def picture(self) -> Any:
        """Return the next picture of the stream."""
        with httpx.stream("GET", f"{self.url}/api/live", timeout=20) as response:
            return next(json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))


@contextmanager
def running(folder: Path, scenario: Scenario = FAULTY) -> Iterator[Running]:
    """Run a collector, something that feeds it, and a dashboard."""
    store = folder / "store"
    tables = with_markup(simulate(scenario))
    collector = Process(["-m", "insitu", "collect", "--store", str(store), "--port", "0", "--judge"])
    processes = [collector]
    feeder = None
    try:
        feeder = Feeder(collector.wait_for(r"collecting on (grpc://\S+)")[1], tables)
        feeder.start()
        dashboard = Process(["-m", "insitu", "dashboard", str(store), "--port", "0"])
        processes.append(dashboard)
        url = dashboard.wait_for(r"dashboard on (http://\S+)")[1]
        yield Running(store, url, collector, dashboard, feeder)
    finally:
        if feeder is not None:
            feeder.stop()
        for process in reversed(processes):
            process.stop()


def why_no_browser() -> str | None:
    """Return why browser tests cannot run here, or None when they can. Never a reason where CI=true."""
    if CHROMIUM.exists() or os.environ.get("CI") == "true":
        return None
    return f"{CHROMIUM} is absent: apt-get install chromium"


@contextmanager
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


class Viewer:
    """One tab with a page of the dashboard open, and what went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(20_000)
        page.add_init_script(FIND_ROOT)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str) -> Viewer:
        self.page.goto(url)
        self.wait("+insituRoot()?.dataset.ticks > 1")
        return self

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.page.wait_for_function(f"() => Boolean({condition})")

    def root(self, name: str) -> str:
        """Return a data attribute of the canvas's root."""
        return str(self.page.evaluate("(name) => insituRoot().dataset[name]", name))

    def wait_ticks(self, count: int) -> None:
        """Wait until `count` more messages of the stream were applied."""
        self.wait(f"+insituRoot()?.dataset.ticks >= {int(self.root('ticks')) + count}")

    def spoken(self) -> str:
        """Return all names and values of the accessibility tree."""
        session = self.page.context.new_cdp_session(self.page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
        return "\n".join(str(node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored"))
