"""What a store's table `gaps` tells, read by those who write it: before there is a reader, and whatever is erased."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from insitu.segments.layout import OPEN, SEALED, list_segments
from insitu.segments.reader import TailReader


def told(store: Path, reasons: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of `gaps` with one of these reasons, whoever wrote them, each once. Raises OSError."""
    seen: set[tuple[int, int]] = set()
    wanted = pa.array(sorted(reasons), pa.utf8())
    for state in (OPEN, SEALED):  # a segment sealed in between is seen at least once
        for name in list_segments(store, state, "gaps"):
            with suppress(FileNotFoundError), closing(TailReader(store, name, state)) as reader:
                for batch in reader.read(final=state == SEALED):
                    for row in batch.data.filter(pc.is_in(batch.data["reason"], wanted)).to_pylist():
                        if (row["epoch"], row["row_seq"]) not in seen:
                            seen.add((row["epoch"], row["row_seq"]))
                            yield row
