"""What an exporter of another package promises, tried with a batch of each table: it acknowledges, retries or refuses.

`check_exporter` is for the tests of such a package too (`insitu.testing`).
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from insitu.exporters.base import Ack, Batch, Level, Refused, Retry
from insitu.exporters.plugged import PluggedExporter
from insitu.identity import Source
from insitu.plugins.discovery import Broken, NotChecked, Plugin, one_line
from insitu.records import IDENTITY, TABLES, schema_of, table_spec
from insitu.vocabulary import DropReason

EPOCH: Final = 0x1E51
NUM_BATCHES: Final = 2
"""Of each table."""
NUM_ROWS: Final = 3
"""Of each batch."""
ATTEMPTS: Final = 3
"""How often a batch is given again when the exporter asks for it."""
FLUSH_S: Final = 0.5
LATE_S: Final = 5.0
"""A flush or a close that comes back so long after its time ignores it, however busy this machine is."""

Open = Callable[[str, Source], Any]


def check(plugin: Plugin, to: str | None) -> str:
    """Check an installed exporter on `to`, or in a temporary folder: what `insitu plugins check` says."""
    opens: Open = plugin.load()
    if to is not None:
        return check_exporter(opens, to)
    with tempfile.TemporaryDirectory() as folder:
        return check_exporter(opens, f"{plugin.name}://{folder}/check")


def check_exporter(opens: Open, to: str, clock: Callable[[], float] = time.monotonic) -> str:
    """Return what held. Raises Broken, in a sentence, where it breaks a promise, and NotChecked where it took nothing.

    opens: what the entry point names. to: a destination it can write; rows of an epoch of the check's own go there.
    clock: seconds.
    """
    threads = _threads()
    try:
        exporter = PluggedExporter(opens(to, Source(epoch=EPOCH, run="0" * 16)))
    except (OSError, ValueError) as error:
        raise NotChecked(f"it cannot open {to} ({error}); give it another by --to") from error
    trial = Trial(exporter, clock)
    for batch in batches():
        trial.give(batch)
    trial.flush()
    for _ in range(2):
        trial.in_time("close", exporter.close)
    left = _threads() - threads
    if left:
        raise Broken(f"after close its threads go on: {', '.join(sorted(thread.name for thread in left))}")
    return trial.told()


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.is_alive()}


def batches() -> Iterator[Batch]:
    """Yield the batches of a short run: some of each table, one after the other."""
    for table in TABLES:
        for seq in range(NUM_BATCHES):
            rows = [_row(table, at, seq * NUM_ROWS + at) for at in range(NUM_ROWS)]
            yield Batch(EPOCH, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of(table)), table)


def _row(table: str, at: int, row_seq: int) -> dict[str, Any]:
    """Return a row: the first plain, the second at the edges of its types, the third null where it may be."""
    identity = {"epoch": EPOCH, "rank": 0, "stage": 0, "row_seq": row_seq}
    columns = list(schema_of(table))[len(IDENTITY) :]
    return identity | {column.name: None if at == 2 else _value(column.type, at) for column in columns}


def _value(kind: pa.DataType, at: int) -> Any:
    if pa.types.is_boolean(kind):
        return at == 0
    if pa.types.is_integer(kind):
        return 7 if at == 0 else 2 ** (kind.bit_width - pa.types.is_signed_integer(kind)) - 1
    if pa.types.is_floating(kind):
        return 0.5 if at == 0 else math.nan
    if pa.types.is_large_binary(kind):
        return b"\x00\xff" if at == 0 else b""
    if pa.types.is_list(kind):
        return [_value(kind.value_type, 0), _value(kind.value_type, 1)] if at == 0 else []
    if pa.types.is_struct(kind):
        return {field.name: _value(field.type, at) for field in kind}
    return 'a "name", ä\n' if at == 0 else ""


@dataclass
class Trial:
    """One exporter, and what it was given."""

    exporter: PluggedExporter
    clock: Callable[[], float]
    taken: list[tuple[int, int]] = field(default_factory=list)
    """(stream, seq) of what was acknowledged."""
    num_refused: int = 0
    asked: dict[int, Retry] = field(default_factory=dict)
    """Stream -> what it raised last for a batch that it took at no attempt: the rest of the stream waits behind it."""
    sent: dict[int, int] = field(default_factory=dict)
    """Stream -> last seq that was acknowledged."""
    durable: dict[int, int] = field(default_factory=dict)

    def give(self, batch: Batch) -> None:
        """Hand over a batch as the drain does, and again when it asks for that."""
        if batch.stream in self.asked:
            return
        for attempt in range(ATTEMPTS):
            try:
                ack = self.exporter.export(batch)
            except Retry as retry:
                self._check_retry(retry)
                if attempt == ATTEMPTS - 1:
                    self.asked[batch.stream] = retry
            except Refused as refused:
                if not isinstance(refused.reason, DropReason):
                    raise Broken(f"it refuses for {refused.reason!r}, which is no DropReason") from None
                self.num_refused += 1
                return
            except Exception as error:
                raise Broken(f"export of a batch of {batch.table} raised {one_line(error)}") from error
            else:
                self._check_ack(ack, batch)
                return

    def _check_retry(self, retry: Retry) -> None:
        if not (math.isfinite(retry.after_s) and retry.after_s >= 0 and isinstance(retry.reason, DropReason)):
            raise Broken(f"it asks to be tried again after {retry.after_s!r} s for {retry.reason!r}")

    def _check_ack(self, ack: Ack, batch: Batch) -> None:
        if (ack.stream, ack.seq) != (batch.stream, batch.seq) or not isinstance(ack.level, Level):
            asked = f"batch {batch.seq} of stream {batch.stream}"
            raise Broken(f"it acknowledged batch {ack.seq} of stream {ack.stream} at {ack.level!r}, given {asked}")
        self.taken.append((batch.stream, batch.seq))
        self.sent[batch.stream] = batch.seq
        self._look(batch.stream)
        if ack.level is Level.DURABLE and self.durable[batch.stream] < batch.seq:
            raise Broken(f"it called a batch of {batch.table} durable, and durable() says {self.durable[batch.stream]}")

    def _look(self, stream: int) -> None:
        durable = self.exporter.durable(stream)
        if not self.durable.get(stream, -1) <= durable <= self.sent.get(stream, -1):
            before, sent = self.durable.get(stream, -1), self.sent.get(stream, -1)
            raise Broken(f"durable({stream}) says {durable}, after {before}, with {sent} the last it took")
        self.durable[stream] = durable

    def flush(self) -> None:
        """Flush: all that was acknowledged is durable then, or was refused since."""
        is_durable = self.in_time("flush", self.exporter.flush)
        given_up = set()
        for stream, seq, reason in self.exporter.refused():
            if not isinstance(reason, DropReason) or seq > self.sent.get(stream, -1):
                raise Broken(f"refused() names batch {seq} of stream {stream} for {reason!r}")
            given_up.add(stream)
        if again := self.exporter.refused():
            raise Broken(f"refused() says {again[0]} twice")
        for stream, seq in self.sent.items():
            self._look(stream)
            if is_durable and stream not in given_up and self.durable[stream] < seq:
                table = next(table for table in TABLES if table_spec(table).stream == stream)
                told = f"flush says that all is durable, and durable() that {table} is up to {self.durable[stream]}"
                raise Broken(f"{told} of {seq}: such rows would never count as stored")

    def in_time(self, what: str, call: Callable[[float], Any]) -> Any:
        """Call something that has a time of its own. Raises Broken where it takes far longer."""
        began = self.clock()
        try:
            found = call(FLUSH_S)
        except Exception as error:
            raise Broken(f"{what} raised {one_line(error)}") from error
        took = self.clock() - began
        if took > FLUSH_S + LATE_S:
            raise Broken(f"{what}({FLUSH_S:g}) took {took:.1f} s")
        return found

    def told(self) -> str:
        """Return what became of the batches. Raises NotChecked where none was taken."""
        if not self.taken:
            why = next(iter(self.asked.values()), "refused")
            raise NotChecked(f"it took none of {NUM_BATCHES * len(TABLES)} batches ({why})")
        num_durable = sum(seq <= self.durable[stream] for stream, seq in self.taken)
        rest = f", refused {self.num_refused}" if self.num_refused else ""
        rest += f", put off {len(self.asked)} tables" if self.asked else ""
        return f"took {len(self.taken)} batches of {len(self.sent)} tables, {num_durable} of them durable{rest}"
