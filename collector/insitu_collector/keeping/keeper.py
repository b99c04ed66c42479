"""The collector's thread that keeps its store: erases, merges, writes twins and the catalog; ingest goes first."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from insitu.segments.erased_file import ErasedFile
from insitu.segments.erasure import Erased
from insitu.segments.layout import OPEN, SEALED, SegmentName, list_segments
from insitu.segments.replacement import finish_replacements
from insitu.segments.shard import ShardWriter
from insitu_collector.keeping.catalog import CatalogBusy, refresh
from insitu_collector.keeping.letters import erase_letters
from insitu_collector.keeping.merge_plan import IN_BACKGROUND, MergeRules, merges
from insitu_collector.keeping.passes import Clean, erase_shard, merge_shard, write_twins
from insitu_collector.keeping.recorder import SHARD as COMMANDS
from insitu_collector.keeping.rewriting import Rewritten
from insitu_collector.keeping.shards import dead_shard, held_by, shards_of
from insitu_collector.keeping.twins import missing_twins, sweep_twins

TICK_S: Final = 2.0
"""How often it asks whether anything is to be erased at once."""
LOOK_S: Final = 60.0
NICE: Final = 10
MOST_BYTES: Final = 1 << 30
"""Of new segments that go into the catalog at one look: each is read from end to end."""
TELL_S: Final = 10.0
"""How long it waits for its rows of `gaps` to be durable before it leaves a segment as it is."""

_log = logging.getLogger("insitu")


class OwnRows(Protocol):
    """Where the collector's own rows go: `insitu_collector.service.ingest.Ingest`."""

    def write_own(self, table: str, rows: Sequence[dict[str, Any]]) -> None: ...

    def has_durable(self, table: str) -> bool: ...


class Keeper:
    """Looks after one store while its collector runs. `look` is one pass; `start` makes a thread that calls it."""

    def __init__(
        self,
        writer: ShardWriter,
        own_rows: OwnRows,
        commit: Callable[[], object],
        *,
        rules: MergeRules | None = IN_BACKGROUND,
        clock: Callable[[], float] = time.monotonic,
        unix_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """commit: asks for a commit soon. rules: None merges nothing, and writes no twins."""
        self._store: Path = writer.store
        self._writer = writer
        self._own_rows = own_rows
        self._commit = commit
        self._rules = rules
        self._clock = clock
        self._unix_clock_ns = unix_clock_ns
        self._erased_file = ErasedFile(self._store)
        self._clean = Clean()
        self._hurried: Erased | None = None
        """What was erased at once already."""
        self._in_letters: Erased | None = None
        """What was taken out of dead letters already: what comes into them later is without it."""
        self._damaged: set[SegmentName] = set()
        self._next_look = clock() + LOOK_S
        self._is_failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="insitu-keep", daemon=True)

    def start(self) -> None:
        """Begin to look, at low priority."""
        self._thread.start()

    def stop(self) -> None:
        """End after the segment it is at. Safe to call when it was never started."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._stopping.wait(TICK_S):
            self.tick()

    def tick(self) -> None:
        """Look once a minute, and at once where something is to be erased now. Raises nothing."""
        try:
            erased = self._erased_file.read()
            if self._is_urgent(erased):
                self._seal_open()
                self.look()
                self._hurried = erased
            elif self._clock() >= self._next_look:
                self._next_look = self._clock() + LOOK_S
                self.look()
            self._is_failing = False
        except Exception as error:
            if not self._is_failing:
                _log.warning("insitu: the store %s cannot be kept in order for now (%s)", self._store, error)
            self._is_failing = True

    def _is_urgent(self, erased: Erased) -> bool:
        now = self._unix_clock_ns()
        return erased is not self._hurried and any(e.due_unix_ns <= now for e in erased.erasures)

    def look(self) -> Rewritten:
        """Make one pass over the collector's shard and those whose writers have gone. Raises OSError, NotWhole."""
        erased, result = self._erased_file.read(), Rewritten()
        if erased is not self._in_letters:  # the command did so, unless it was killed
            erase_letters(self._store, erased)
            self._in_letters = erased
        finish_replacements(self._store, self._writer.shard)
        self._pass_over_own(erased, result)
        for shard in shards_of(self._store):
            if self._stopping.is_set():
                break
            if shard not in (self._writer.shard, COMMANDS) and self._has_work(shard, erased):
                with dead_shard(self._store, shard, self._tell) as held:
                    if held is not None:
                        erase_shard(self._store, held, erased, self._tell, self._clean, result)
                        if self._rules is not None:
                            merge_shard(self._store, held, self._rules, result, self._damaged)
        self._damaged.update(result.damaged)
        if self._rules is not None:
            write_twins(self._store, self._due_twins(self._rules), erased)
        sweep_twins(self._store)
        with suppress(CatalogBusy):
            refresh(self._store, MOST_BYTES)
        return result

    def _pass_over_own(self, erased: Erased, result: Rewritten) -> None:
        erase_shard(self._store, self._writer, erased, self._tell, self._clean, result)
        if self._rules is not None:
            merge_shard(self._store, self._writer, self._rules, result, self._damaged)

    def _has_work(self, shard: str, erased: Erased) -> bool:
        held = held_by(self._store, shard)
        if erased and self._clean.unseen(held, erased):
            return True
        return self._rules is not None and bool(merges(held, self._rules, self._damaged))

    def _due_twins(self, rules: MergeRules) -> list[SegmentName]:
        """Return the segments without a twin that are not going to be merged: large ones, and old ones."""
        due = []
        oldest_ns = self._unix_clock_ns() - rules.max_span_s * 1e9
        for name in missing_twins(self._store):
            with suppress(FileNotFoundError):
                stat = name.path(self._store, SEALED).stat()
                if stat.st_size > rules.target_bytes // 2 or stat.st_mtime_ns < oldest_ns:
                    due.append(name)
        return due

    def _tell(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self._own_rows.write_own("gaps", rows)
            self._commit()
            if not self._wait(lambda: self._own_rows.has_durable("gaps")):
                raise OSError("what is erased could not be written down yet")

    def _seal_open(self) -> None:
        """Seal what is open: erased rows may be in it."""
        open_now = {name for name in list_segments(self._store, OPEN) if name.shard == self._writer.shard}
        self._writer.seal_open()
        self._commit()
        self._wait(lambda: open_now.isdisjoint(list_segments(self._store, OPEN)))

    def _wait(self, is_done: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + TELL_S
        pause = threading.Event()
        while not is_done():
            if time.monotonic() > deadline:
                return False
            pause.wait(0.02)
        return True
