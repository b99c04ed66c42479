"""One reader of the store for all viewers: a thread that follows it, more slowly while nobody looks."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.credentials import CredentialError
from insitu_collector.rows.slices import Group, Groups, full_name, short_name
from insitu_collector.store import open_store
from insitu_dashboard.notices import Level, Notice, State
from insitu_dashboard.picture import blank_picture, picture
from insitu_dashboard.run_view import RunView
from insitu_dashboard.span_document import live_document, window_document

if TYPE_CHECKING:
    from insitu_collector.store import Store
    from insitu_collector.tail import Tail

_log = logging.getLogger("insitu")

TABLES: Final = ("sources", "clocks", "intervals", "steps", "health", "requests", "verdicts", "gaps")
HISTORY_NS: Final = 3600 * 1_000_000_000
"""How far before its newest segment a store is read when the dashboard starts."""
POLL_S: Final = 0.5
IDLE_POLL_S: Final = 5.0
WATCHED_S: Final = 10.0
"""How long after the last question somebody is taken to be looking."""
PICTURE_EVERY_S: Final = 1.0
CROWD: Final = 8
"""Open streams above which pictures are made half as often."""
MOST_RUNS: Final = 8
"""Each replica counts; those of the newest run are kept however many they are."""
LIVE_NS: Final = 12_000_000_000
"""What a timeline is given when it is opened."""
KEPT_DELTAS: Final = 64


@dataclass(slots=True)
class _Run:
    view: RunView = field(default_factory=RunView)
    deltas: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_DELTAS))
    """New spans as JSON texts, made once for all viewers; empty while nobody looked."""
    num_deltas: int = 0
    pictures: dict[int, tuple[float, str]] = field(default_factory=dict)
    """Window -> when it was made, and the document."""


class Hub:
    """What all pages read. Every method may be called from any thread. Nothing here writes to the store."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """path: as `open_store` takes it."""
        self.path = path
        self.num_streams = 0
        self.error: str | None = None
        """Why the store cannot be read now, or None."""
        self._lock = threading.RLock()
        self._runs: dict[Group, _Run] = {}
        self._groups = Groups()
        self.store: Store | None = None
        """None: it was not opened yet."""
        self._tail: Tail | None = None
        self._asked_s = 0.0
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="insitu dashboard hub", daemon=True)

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> Hub:
        """Follow the store from now on."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop following; what was read can still be asked for."""
        self.stop_streams()
        if self.store is not None:
            self.store.close()  # a look that waits for a collector ends
        if self._thread.is_alive():
            self._thread.join()
        if self._tail is not None:
            self._tail.close()

    def stop_streams(self) -> None:
        """Let every open stream end at its next look."""
        self._stop.set()
        self._wake.set()

    @property
    def is_closing(self) -> bool:
        return self._stop.is_set()

    def wait_loaded(self, timeout_s: float) -> bool:
        """Wait until the store was read once; return whether it was."""
        return self._loaded.wait(timeout_s)

    def _follow(self) -> None:
        while not self._stop.is_set():
            self.poll()
            self._wake.wait(POLL_S if self._is_watched else IDLE_POLL_S)
            self._wake.clear()

    @property
    def _is_watched(self) -> bool:
        return self.num_streams > 0 or time.monotonic() - self._asked_s < WATCHED_S

    def _asked(self) -> None:
        was_watched, self._asked_s = self._is_watched, time.monotonic()
        if not was_watched:
            self._wake.set()

    def poll(self) -> None:
        """Read what is new. A store that cannot be read is a state to show, not an error to raise."""
        try:
            rows = self._read()
        except (OSError, CredentialError, pa.ArrowException) as error:
            if self.error is None and not self.is_closing:
                _log.warning("insitu: the dashboard cannot read the store: %s", error)
            self.error = str(error)
        else:
            with self._lock:
                self.error = None
                self._take(rows)
        self._loaded.set()

    def _read(self) -> dict[str, pa.Table]:
        if self.store is None:
            self.store = open_store(self.path)
        if self._tail is None:
            self._tail = self.store.tail(TABLES, since_unix_ns=self.store.last_written_ns() - HISTORY_NS)
        rows = self._tail.poll()
        if not rows:
            self.store.check()
        return rows

    def _take(self, rows: dict[str, pa.Table]) -> None:
        if not rows:
            return
        verdicts, gaps = rows.pop("verdicts", None), rows.pop("gaps", None)
        for group, tables in self._groups.sort(rows).items():
            run = self._runs.setdefault(group, _Run())
            run.view.add(tables)
            self._add_delta(run, tables)
        for group, run in self._runs.items():
            if verdicts is not None:
                run.view.take_verdicts(verdicts.filter(pc.starts_with(verdicts["verdict"], f"{short_name(group)}-")))
            if gaps is not None:
                run.view.take_gaps(gaps)
        newest = self._newest_first()
        for group in newest[max(MOST_RUNS, self._groups.num_replicas(newest[0][0])) :] if newest else ():
            del self._runs[group]

    def _newest_first(self) -> list[Group]:
        """Return the groups by the newest record of their run, in Unix time, each run's replicas in order.

        A run that lives comes before one that ended.
        """
        last: dict[str, int] = {}
        for (name, _), run in self._runs.items():
            view = run.view
            last[name] = max(view.timeline.unix_ns(view.last_ns) if view.last_ns else 0, last.get(name, 0))
        return sorted(self._runs, key=lambda group: (-last[group[0]], group))

    def _add_delta(self, run: _Run, tables: Mapping[str, pa.Table]) -> None:
        if "intervals" in tables or "health" in tables:
            rows = tables.get("intervals", run.view.intervals.between(0, 0))
            run.num_deltas += 1
            run.deltas.append(json.dumps(live_document(run.view, rows, reset=False)) if self.num_streams else "")

    # -- what pages ask for --------------------------------------------------------------------------------------

    def runs(self) -> list[str]:
        """Return what can be shown, the run with the newest record first, each replica by its `full_name`."""
        with self._lock:
            return [full_name(group) for group in self._newest_first()]

    def _find(self, run: str | None) -> tuple[Group, _Run] | None:
        """Return the run whose name begins so (None: that with the newest record), or None. Under the lock.

        Of a run its first replica, or after a dot that which is named: `5eed.1`; `.1` is of the newest run that has it.
        """
        self._asked()
        begins, _, number = (run or "").partition(".")
        named = [group for group in self._newest_first() if group[0].startswith(begins)]
        group = next((group for group in named if number in ("", str(group[1]))), None)
        return None if group is None else (group, self._runs[group])

    @property
    def tick_s(self) -> float:
        """Return how often pictures are made."""
        return PICTURE_EVERY_S * (1 if self.num_streams <= CROWD else 2)

    def picture(self, run: str | None, window_s: int, at_unix_ns: int | None = None) -> str:
        """Return the picture of a run as a JSON text; always one, whatever the state of store and run."""
        now_s = time.monotonic()
        with self._lock:
            found = self._find(run)
            if found is None or self.error is not None:
                return json.dumps(self._blank(run))
            (name, replica), kept = found
            made_s, text = kept.pictures.get(window_s, (float("-inf"), ""))
            if at_unix_ns is None and now_s - made_s < 0.9 * self.tick_s:
                return text
            kept.view.settle()
            at_ns = None if at_unix_ns is None else at_unix_ns - kept.view.timeline.unix_minus_mono_ns
            made = picture(
                kept.view,
                time.time_ns(),
                window_s,
                run=name,
                replica=replica,
                num_replicas=self._groups.num_replicas(name),
                at_ns=at_ns,
                num_damaged=self.store.num_damaged if self.store is not None else 0,
            )
            made["header"] |= {"viewers": self.num_streams, "tick_s": self.tick_s}
            text = json.dumps(made)
            if at_unix_ns is None:
                kept.pictures[window_s] = now_s, text
            return text

    def _blank(self, run: str | None) -> dict[str, Any]:
        if self.error is not None:
            remedy = "Check that it is there and that you may read it; this page goes on by itself once it can be read."
            return blank_picture(State.ERROR, Notice(Level.ERROR, f"The store cannot be read: {self.error}.", remedy))
        if run and self._runs:
            name, _, replica = run.partition(".")
            of = f"run {name}" if name else "a run"
            what = f"Replica {replica} of {of}" if replica.isdecimal() else f"Run {run}"
            text = f"{what} is not among the recent ones of this store."
            here = ", ".join(self.runs()[:5])
            remedy = f"Here are: {here}. Of older runs `insitu stalls {self.path} --run ...` tells."
            return blank_picture(State.ERROR, Notice(Level.ERROR, text, remedy))
        return blank_picture(State.EMPTY if self._loaded.is_set() else State.LOADING)

    def live_spans(self, run: str | None) -> tuple[int, str] | None:
        """Return (number of the newest delta, the last seconds of spans as a JSON text), or None without a run."""
        with self._lock:
            found = self._find(run)
            if found is None:
                return None
            view = found[1].view
            end = view.last_ns or 0
            rows = view.intervals.between(end - LIVE_NS, end + 1)
            return found[1].num_deltas, json.dumps(live_document(view, rows, reset=True))

    def new_spans(self, run: str | None, after: int) -> list[str] | None:
        """Return the deltas that followed number `after`; None when some of them are gone: ask for `live_spans`."""
        with self._lock:
            found = self._find(run)
            if found is None:
                return None
            num_new = found[1].num_deltas - after
            deltas = list(found[1].deltas)[-num_new:] if num_new else []
            return deltas if len(deltas) == num_new and all(deltas) else None

    def spans(self, run: str | None, t0_unix_ns: int, t1_unix_ns: int, pixels: int) -> str | None:
        """Return the spans of a window as a JSON text, or None without such a run."""
        with self._lock:
            found = self._find(run)
            if found is None:
                return None
            offset = found[1].view.timeline.unix_minus_mono_ns
            return json.dumps(window_document(found[1].view, t0_unix_ns - offset, t1_unix_ns - offset, pixels))
