"""Records of others that the collector numbers itself: who waits for their sync, and what became of them."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

from insitu.segments.layout import Key
from insitu.vocabulary import DropReason


class Received:
    """The account of such rows. Not for several threads at once: `Ingest` has the lock."""

    def __init__(self) -> None:
        self.durable: Counter[str] = Counter()
        """Rows by table."""
        self.dropped: dict[str, Counter[str]] = {}
        """Rows by table and reason."""
        self._waiting: dict[Key, tuple[Future[bool], str, int]] = {}

    def refused(self, table: str, num_rows: int) -> None:
        """So many rows came and are not stored."""
        self.durable.setdefault(table, 0)
        self._drop(table, DropReason.REFUSED_INVALID, num_rows)

    def wait(self, key: Key, table: str, num_rows: int) -> Future[bool]:
        """Return what the next sync sets: whether these rows are durable."""
        durable: Future[bool] = Future()
        durable.set_running_or_notify_cancel()  # who stops waiting cannot cancel it
        self._waiting[key] = durable, table, num_rows
        return durable

    def settle(self, key: Key, *, is_durable: bool) -> bool:
        """Say what a sync did; return whether the rows were of these."""
        future, table, num_rows = self._waiting.pop(key, (None, "", 0))
        if future is None:
            return False
        if is_durable:
            self.durable[table] += num_rows
        else:  # perhaps on disk; who sent them is asked for them again, and they come as new ones
            self._drop(table, DropReason.STORE_FAILED, num_rows)
        future.set_result(is_durable)
        return True

    def _drop(self, table: str, reason: DropReason, num_rows: int) -> None:
        if num_rows:
            self.dropped.setdefault(table, Counter())[str(reason)] += num_rows


def nothing_to_wait_for() -> Future[bool]:
    """Return what is said of no rows: they are durable."""
    durable: Future[bool] = Future()
    durable.set_result(True)
    return durable
