"""The kit for exporters lets ours pass, and each kind of wrong one is told what is wrong with it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from insitu.check_exporter import check_exporter
from insitu.exporters import Ack, Batch, Level, Refused, Retry, open_exporter
from insitu.identity import Source
from insitu.plugins.discovery import Broken, NotChecked
from insitu.records import TABLES
from insitu.testing import FakeClock
from insitu.vocabulary import DropReason

ALL = 2 * len(TABLES)


@pytest.mark.parametrize("to", ["memory://checked", "file://{}/store"])
def test_our_own_pass(to: str, tmp_path: Path) -> None:
    told = check_exporter(open_exporter, to.format(tmp_path))
    assert told == f"took {ALL} batches of {len(TABLES)} tables, {ALL} of them durable"


def test_a_collector_that_is_not_there_is_not_checked() -> None:
    class Waits(Right):
        def export(self, batch: Batch) -> Ack:
            raise Retry(1.0)

    with pytest.raises(NotChecked, match=rf"took none of {ALL} batches \(try again in 1 s"):
        check_exporter(Waits, "x://")
    with pytest.raises(NotChecked, match=r"cannot open nowhere:// .destination 'nowhere://' has no .* by --to"):
        check_exporter(open_exporter, "nowhere://")


class Right:
    """Right: durable with a flush; refuses what it cannot store."""

    def __init__(self, to: str, source: Source) -> None:
        self.taken: dict[int, int] = {}
        self.done: dict[int, int] = {}

    def export(self, batch: Batch) -> Ack:
        if batch.table == "captures":
            raise Refused(DropReason.REFUSED_INVALID)
        self.taken[batch.stream] = batch.seq
        return Ack(batch.stream, batch.seq, Level.RECEIVED)

    def durable(self, stream: int) -> int:
        return self.done.get(stream, -1)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        return []

    def flush(self, timeout_s: float) -> bool:
        self.done = dict(self.taken)
        return True

    def close(self, timeout_s: float) -> None:
        self.flush(timeout_s)


def test_a_right_one_passes_and_what_it_refuses_is_said() -> None:
    assert check_exporter(Right, "x://").endswith(f"{ALL - 2} of them durable, refused 2")


class Raises(Right):
    def export(self, batch: Batch) -> Ack:
        raise ConnectionError("broker gone")


class Other(Right):
    def export(self, batch: Batch) -> Ack:
        return Ack(batch.stream, batch.seq + 1, Level.RECEIVED)


class Nothing(Right):
    def export(self, batch: Batch) -> Ack:
        return None  # type: ignore[return-value]


class Early(Right):
    def export(self, batch: Batch) -> Ack:
        return Ack(batch.stream, batch.seq, Level.DURABLE)


class Ahead(Right):
    def durable(self, stream: int) -> int:
        return 9


class Back(Right):
    num_asked = 0

    def durable(self, stream: int) -> int:
        self.num_asked += 1
        return self.taken[stream] if self.num_asked % 2 else -1


class Never(Right):
    def flush(self, timeout_s: float) -> bool:
        return True


class Twice(Right):
    def refused(self) -> list[tuple[int, int, DropReason]]:
        return [(0, 0, DropReason.DISK_FULL)]


class Unknown(Right):
    def refused(self) -> list[tuple[int, int, DropReason]]:
        return [(0, 99, DropReason.DISK_FULL)]


class Closes(Right):
    num_closed = 0

    def close(self, timeout_s: float) -> None:
        self.num_closed += 1
        if self.num_closed > 1:
            raise ValueError("I/O operation on closed file")


class Whim(Right):
    def export(self, batch: Batch) -> Ack:
        raise Refused("because")  # type: ignore[arg-type]


class Soon(Right):
    def export(self, batch: Batch) -> Ack:
        raise Retry(-1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Raises, "export of a batch of sources raised ConnectionError: broker gone"),
        (Other, "acknowledged batch 1 of stream 0"),
        (Nothing, "returned None"),
        (Early, "called a batch of sources durable, and durable.. says -1"),
        (Ahead, r"durable\(0\) says 9"),
        (Back, r"durable\(0\) says -1, after 0"),
        (Never, "would never count as stored"),
        (Twice, "twice"),
        (Unknown, "names batch 99"),
        (Closes, "close raised ValueError"),
        (Whim, "'because', which is no DropReason"),
        (Soon, "asks to be tried again after -1.0 s"),
    ],
)
def test_a_wrong_one_is_told_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(Broken, match=message):
        check_exporter(make, "x://")


def test_a_flush_that_ignores_its_time_is_told(insitu_clock: FakeClock) -> None:
    class Slow(Right):
        def flush(self, timeout_s: float) -> bool:
            insitu_clock.advance(9.5)
            return super().flush(timeout_s)

    with pytest.raises(Broken, match=r"flush\(0\.5\) took 9\.5 s"):
        check_exporter(Slow, "x://", insitu_clock)


def test_what_is_left_after_close_is_told() -> None:
    over = threading.Event()

    class Leaves(Right):
        def __init__(self, to: str, source: Source) -> None:
            super().__init__(to, source)
            threading.Thread(target=over.wait, name="acme-sender").start()

    try:
        with pytest.raises(Broken, match="threads go on: acme-sender"):
            check_exporter(Leaves, "x://")
    finally:
        over.set()
