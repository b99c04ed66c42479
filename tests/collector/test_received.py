"""Rows that come without numbers get the collector's own, and each is durable or counted."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from insitu.identity import Source
from insitu.records import schema_of
from insitu.segments.shard import ShardWriter
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.store import open_store


def named(*names: str) -> Any:
    """Return what makes rows of `logs` with these names."""

    def make(source: Source, first: int) -> pa.RecordBatch:
        rows = [
            {"epoch": source.epoch, "rank": source.rank, "stage": source.stage, "row_seq": first + i, "name": name}
            for i, name in enumerate(names)
        ]
        return pa.RecordBatch.from_pylist(rows, schema=schema_of("logs"))

    return make


def of_logs(ingest: Ingest) -> tuple[int, int, dict[str, int]]:
    """Return how many rows of `logs` were produced, are durable, and were dropped by reason."""
    account = ingest.account()
    return account["produced"]["logs"], account["durable"].get("logs", 0), account["dropped"].get("logs", {})


def stored(store: Path) -> list[tuple[int, str]]:
    table = open_store(store).table("logs")
    return list(zip(table["row_seq"].to_pylist(), table["name"].to_pylist(), strict=True))


def test_rows_are_numbered_in_order_and_known_to_be_durable_after_the_sync(tmp_path: Path) -> None:
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    first = ingest.write_received("logs", 2, named("a", "b"))
    second = ingest.write_received("logs", 1, named("c"))
    assert not first.done() and not second.done()
    assert of_logs(ingest) == (3, 0, {})
    ingest.commit()
    assert first.result(0) and second.result(0)
    assert of_logs(ingest) == (3, 3, {})
    ingest.close()
    assert stored(tmp_path) == [(0, "a"), (1, "b"), (2, "c")]


def test_refused_rows_have_a_number_and_are_counted(tmp_path: Path) -> None:
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    assert ingest.write_received("logs", 0, named()).result(0), "nothing to wait for"
    ingest.refuse_received("logs", 2)
    assert of_logs(ingest) == (2, 0, {"refused_invalid": 2})
    ingest.write_received("logs", 1, named("a"))
    ingest.refuse_received("logs", 3)
    ingest.close()
    assert of_logs(ingest) == (6, 1, {"refused_invalid": 5})
    assert stored(tmp_path) == [(2, "a")]


def test_rows_whose_sync_failed_are_told_so_counted_and_hold_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    ingest.commit()

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    lost = ingest.write_received("logs", 2, named("a", "b"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        ingest.commit()
    assert lost.result(0) is False
    again = ingest.write_received("logs", 2, named("a", "b"))
    ingest.commit()
    assert again.result(0) is True
    assert of_logs(ingest) == (4, 2, {"store_failed": 2})
    ingest.close()


def test_what_waits_at_the_end_is_settled_by_it(tmp_path: Path) -> None:
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    last = ingest.write_received("logs", 1, named("a"))
    ingest.close()
    assert last.result(0) is True


def test_what_the_disk_does_not_take_counts_nowhere(tmp_path: Path) -> None:
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    ingest.close()  # a closed shard takes nothing, as a full disk
    with pytest.raises(OSError):
        ingest.write_received("logs", 1, named("a"))
    assert "logs" not in ingest.account()["produced"]


def test_who_stops_waiting_takes_nothing_back(tmp_path: Path) -> None:
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    given_up = ingest.write_received("logs", 1, named("a"))
    assert not given_up.cancel()
    ingest.close()
    assert stored(tmp_path) == [(0, "a")]
