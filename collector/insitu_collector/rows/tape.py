"""Rows of the recent past as numpy columns."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]


class Tape:
    """Rows of the recent past as numpy columns; the column `t` is their time."""

    def __init__(self, **kinds: type) -> None:
        self._kinds = {"t": np.int64, **kinds}
        self._chunks: deque[Columns] = deque()

    def add(self, **columns: NDArray[Any]) -> None:
        """Append rows; columns of one length."""
        assert columns.keys() == self._kinds.keys(), f"this tape has the columns {sorted(self._kinds)}"
        if len(columns["t"]):
            self._chunks.append(columns)

    def between(self, t0_ns: int, t1_ns: int | None = None) -> Columns:
        """Return the rows with t0_ns <= t < t1_ns, in the order they came."""
        found = []
        for chunk in self._chunks:
            t = chunk["t"]
            wanted = t >= t0_ns if t1_ns is None else (t >= t0_ns) & (t < t1_ns)
            if wanted.any():
                found.append({name: column[wanted] for name, column in chunk.items()})
        if not found:
            return {name: np.zeros(0, kind) for name, kind in self._kinds.items()}
        return {name: np.concatenate([chunk[name] for chunk in found]) for name in self._kinds}

    def trim(self, t0_ns: int, t1_ns: int | None = None) -> None:
        """Let go of chunks that lie wholly before `t0_ns`, and of rows from `t1_ns` on."""
        if t1_ns is not None:
            kept = [{name: column[chunk["t"] < t1_ns] for name, column in chunk.items()} for chunk in self._chunks]
            self._chunks = deque(chunk for chunk in kept if len(chunk["t"]))
        while self._chunks and self._chunks[0]["t"].max() < t0_ns:
            self._chunks.popleft()
