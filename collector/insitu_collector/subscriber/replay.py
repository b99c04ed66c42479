"""Sending what a store holds once more: a window of time, or dead letters. Live data goes first."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.exporters.base import Batch
from insitu.exporters.otlp.ship import Limits
from insitu.forwarding.cursor import Cursor
from insitu.identity import Source
from insitu.segments.retention import NAMES
from insitu_collector.subscriber.account import Account
from insitu_collector.subscriber.backlog import backlog
from insitu_collector.subscriber.dead import listed, read, remove
from insitu_collector.subscriber.delivery import Delivery, Wait
from insitu_collector.subscriber.earlier import Earlier
from insitu_collector.subscriber.follower import Follower, Read
from insitu_collector.subscriber.letter import BadLetter
from insitu_collector.subscriber.mapping import TABLES, Mapping
from insitu_collector.subscriber.passed_on import TABLES as PASSED_ON
from insitu_collector.subscriber.payloads import Payload
from insitu_collector.subscriber.subscriber import is_live
from insitu_collector.subscriber.times import FOR_EVER, has_time, within

_log = logging.getLogger("insitu")

LIVE_BEHIND_S: Final = 10.0
"""A replay waits while the subscriber of the same receiver is further behind than this and a metric interval: what
metrics tell of waits so long as it is."""
LOOK_S: Final = 5.0
_LEARNED: Final = (*NAMES, "requests", "steps")
"""Tables that are read whether or not they are sent: they say what the others mean."""


@dataclass
class Replayed:
    """What a replay did beside what the account counts."""

    num_rows: int = 0
    """Rows of the store that were in the window, told or counted as lost."""
    num_letters: int = 0
    num_unreadable: int = 0
    """Letters and stretches of segments that could not be read; they stay as they are."""
    is_whole: bool = True
    """It came to its end; otherwise it was asked to stop."""


@dataclass(frozen=True, slots=True)
class Window:
    """Rows that began in [since, until), Unix ns."""

    since_unix_ns: int = -FOR_EVER
    until_unix_ns: int = FOR_EVER

    @property
    def is_bounded(self) -> bool:
        return self != Window()


@dataclass
class Cut:
    """Cuts batches to a window. Rows without a time go by their step, as far as `steps` tell when that was."""

    window: Window
    _steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By epoch: the first and the last step that began in the window."""

    def learn(self, reads: Iterable[Read], source_of: Callable[[int], Source | None]) -> None:
        """Learn which steps began in the window."""
        for each in reads:
            batch, source = each.batch, source_of(each.batch.epoch)
            if batch.table != "steps" or source is None:
                continue
            found = within(batch, source, self.window.since_unix_ns, self.window.until_unix_ns)
            if found.num_rows:
                first, last = pc.min(found["step_id"]).as_py(), pc.max(found["step_id"]).as_py()
                known = self._steps.get(batch.epoch, (first, last))
                self._steps[batch.epoch] = min(first, known[0]), max(last, known[1])

    def of(self, batch: Batch, source: Source | None) -> Batch | None:
        """Return the rows of a batch that are in the window; None where there are none."""
        if not self.window.is_bounded or batch.table in NAMES:
            return batch
        if has_time(batch.table):
            if source is None and batch.table not in PASSED_ON:
                return None
            rows = within(batch, source, self.window.since_unix_ns, self.window.until_unix_ns)
        else:
            rows = self._of_steps(batch)
        return replace(batch, data=rows) if rows.num_rows else None

    def _of_steps(self, batch: Batch) -> pa.RecordBatch:
        first, last = self._steps.get(batch.epoch, (0, -1))
        step = batch.data["step_id"]
        return batch.data.filter(pc.and_(pc.greater_equal(step, first), pc.less_equal(step, last)))


class Replay:
    """Sends once more. Holds no cursor: one that was stopped begins anew."""

    def __init__(
        self, store: Path, to: str, account: Account, delivery: Delivery, wait: Wait, limits: Limits | None = None
    ) -> None:
        """account: of `delivery`; rows that cannot be sent are counted there, as a subscriber does."""
        self._store = store
        self._to = to
        self._account = account
        self._delivery = delivery
        self._wait = wait
        self._limits = limits or Limits.of(os.environ)
        self._next_look_s = -math.inf
        self._is_waiting = False
        self.result = Replayed()

    def rows(self, window: Window, tables: Sequence[str] = TABLES) -> None:
        """Send the rows of a window. Raises GaveUp."""
        mapping = Mapping(self._limits.batch, self._limits.metrics_s, Earlier(self._store))
        cut = Cut(window)
        if window.is_bounded:
            self._learn_steps(cut)
        names = [table for table in TABLES if table in tables or table in _LEARNED]
        follower = Follower(self._store, names, lambda _: False, since_unix_ns=window.since_unix_ns)
        try:
            for chunk in follower.chunks():
                mapped = mapping.take(list(self._selected(chunk, cut, mapping, tables)))
                self._account.rows.update(mapped.lost_rows)
                metrics = [payload for payload, _ in [*mapping.due(), *mapping.overdue()]]
                if not self._send([*mapped.payloads, *metrics]):
                    return
                follower.settle([each.key for each in chunk])
            self._send([payload for payload, _ in mapping.due(all_of_it=True)])
        finally:
            self.result.num_unreadable += len(follower.damage)
            follower.close()

    def letters(self, of: str) -> None:
        """Send the dead letters of a destination; what is taken goes, what is refused is a dead letter again."""
        for path, _ in list(listed(self._store, of)):
            try:
                _, payload = read(self._store, path)
            except FileNotFoundError:
                continue
            except BadLetter as error:
                self.result.num_unreadable += 1
                _log.warning(
                    "insitu: dead letter %s is not sent: %s; `insitu store dead drop %s %s` removes it",
                    *(path.stem, error.text, self._store, path.stem),
                )
                continue
            if not self._send([payload]):
                return
            remove(path)
            self.result.num_letters += 1

    def _learn_steps(self, cut: Cut) -> None:
        """Read when steps began, ahead of all else."""
        sources: dict[int, Source] = {}
        follower = Follower(self._store, ("sources", "steps"), lambda _: False, since_unix_ns=cut.window.since_unix_ns)
        for chunk in follower.chunks():
            for each in chunk:
                if each.batch.table == "sources":
                    sources |= {row["epoch"]: Source.of_row(row) for row in each.batch.data.to_pylist()}
            cut.learn(chunk, sources.get)
            follower.settle([each.key for each in chunk])
        follower.close()

    def _selected(self, chunk: Sequence[Read], cut: Cut, mapping: Mapping, tables: Sequence[str]) -> Iterator[Read]:
        """Yield what is to be mapped; what is only learned from counts as sent."""
        for each in sorted(chunk, key=lambda each: each.batch.table != "sources"):
            if each.batch.table == "sources":
                mapping.take([each])
                continue
            batch = cut.of(each.batch, mapping.source(each.batch.epoch))
            if batch is not None and each.batch.table in tables:
                self.result.num_rows += 0 if each.batch.table in NAMES else batch.num_rows
                yield Read(batch, False)
            elif each.batch.table in _LEARNED:
                yield Read(each.batch, True)

    def _send(self, payloads: Iterable[Payload | None]) -> bool:
        for payload in payloads:
            if payload is not None and not (self._is_our_turn() and self._delivery.deliver(payload)):
                self.result.is_whole = False
                return False
        return True

    def _is_our_turn(self) -> bool:
        """Wait while the live subscriber of this receiver is behind; return False where asked to stop."""
        now = time.monotonic()
        if now < self._next_look_s:
            return True
        while is_live(self._store, self._to):
            behind_s = backlog(self._store, Cursor(self._store, self._to), TABLES).behind_s(time.time_ns())
            if behind_s <= LIVE_BEHIND_S + self._limits.metrics_s:
                break
            if not self._is_waiting:
                self._is_waiting = True
                _log.warning(
                    "insitu: the replay waits: the subscriber of %s goes first, and is %.0f s behind",
                    self._to,
                    behind_s,
                )
            if self._wait(LOOK_S):
                return False
        self._is_waiting = False
        self._next_look_s = time.monotonic() + LOOK_S
        return True
