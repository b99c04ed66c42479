"""What of a store was forwarded to one destination: kept beside its segments, so that a forwarder can go on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from insitu.segments.layout import FORMAT, Key, make_folder, sync_folder

SCHEMA: Final = "insitu.cursor/1"

_log = logging.getLogger("insitu")

Range = tuple[int, int]
"""Seqs from the first number up to, and without, the second."""
Streams = dict[tuple[int, int], list[Range]]
"""(epoch, stream) -> what of it is durable at the destination: one range, where nothing is missing between."""


class Cursor:
    """`STORE/v1/forward/<destination>.json`, in seqs of streams, which no compaction changes.

    What it says is a matter of work saved, never of rows: a receiver keeps one of what comes twice, so a cursor that is
    lost or cannot be read only has everything sent again.
    """

    def __init__(self, store: Path, to: str) -> None:
        self._to = to
        self._path = folder_of(store) / f"{id_of(to)}.json"
        self.account: dict[str, Any] = {}
        """What its owner counts beside it; plain JSON, written by `save`."""
        self._store_id: str | None = None
        self._streams = self._load()

    def _load(self) -> Streams:
        try:
            found = json.loads(self._path.read_text())
            streams = parse(found, self._to)
            self.account = dict(found.get("account", {}))
            self._store_id = found.get("store_id")
            return streams
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.warning("insitu: %s cannot be read (%s); all of the store is sent again", self._path, error)
            return {}

    def holds_of(self, store_id: str | None) -> bool:
        """Tell whether it is of the store there; None: of a collector that tells no identity."""
        return self._store_id == store_id

    def is_of(self, store_id: str | None) -> None:
        """The store there is this one: what was noted of another one says nothing of it."""
        if not self.holds_of(store_id) and self._streams:
            _log.warning("insitu: another store answers at %s than before; all of this one is sent again", self._to)
            self._streams = {}
        self._store_id = store_id

    def __contains__(self, key: Key) -> bool:
        return any(first <= key.seq < end for first, end in self._streams.get((key.epoch, key.stream), ()))

    def missing(self, epoch: int, stream: int, first: int, end: int) -> list[Range]:
        """Return the seqs of [first, end) that are not there."""
        found: list[Range] = []
        for known_first, known_end in self._streams.get((epoch, stream), ()):
            if first < known_first:
                found.append((first, min(known_first, end)))
            first = max(first, known_end)
            if first >= end:
                return [each for each in found if each[0] < each[1]]
        return [*found, (first, end)]

    def note(self, keys: Iterable[Key]) -> None:
        """These batches are durable there."""
        found: dict[tuple[int, int], list[int]] = {}
        for key in keys:
            found.setdefault((key.epoch, key.stream), []).append(key.seq)
        for stream, seqs in found.items():
            self._streams[stream] = merged(self._streams.get(stream, ()), seqs)

    def keep_only(self, epochs: set[int]) -> None:
        """Forget processes of which the store holds nothing any more."""
        self._streams = {stream: ranges for stream, ranges in self._streams.items() if stream[0] in epochs}

    def save(self) -> None:
        """Write it, so that a crash leaves the old one or the new. Raises OSError."""
        make_folder(self._path.parent)
        draft = self._path.with_suffix(".draft")
        with draft.open("w") as file:
            account = {"account": self.account} if self.account else {}
            store_id = {"store_id": self._store_id} if self._store_id else {}
            json.dump(document(self._streams, self._to) | store_id | account, file)
            file.flush()
            os.fdatasync(file.fileno())
        os.replace(draft, self._path)
        sync_folder(self._path.parent)


def folder_of(store: Path) -> Path:
    """Return where the cursors of a store lie."""
    return store / FORMAT / "forward"


def id_of(to: str) -> str:
    """Return what a destination is called in names of files: 16 hex digits."""
    return hashlib.sha256(to.encode()).hexdigest()[:16]


def merged(ranges: Sequence[Range], seqs: Iterable[int]) -> list[Range]:
    """Return the ranges with these numbers in them, disjoint and in order."""
    found: list[Range] = []
    for first, end in sorted([*ranges, *((seq, seq + 1) for seq in seqs)]):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return found


def document(streams: Streams, to: str) -> dict[str, Any]:
    """Return what the file says."""
    rows = [
        {"epoch": str(epoch), "stream": stream, "seqs": [list(each) for each in ranges]}
        for (epoch, stream), ranges in sorted(streams.items())
    ]
    return {"schema": SCHEMA, "to": to, "streams": rows}


def parse(found: Any, to: str) -> Streams:
    """Return what a document says. Raises ValueError when it is another's or none."""
    try:
        if (found["schema"], found["to"]) != (SCHEMA, to):
            raise ValueError("it is no cursor of this destination")
        return {
            (int(row["epoch"]), int(row["stream"])): [(int(first), int(end)) for first, end in row["seqs"]]
            for row in found["streams"]
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no cursor: {error!r}") from None
