"""What an erasure leaves of rows: those of a request or of whole processes go, names of requests elsewhere too. Pure.

Whoever reads a store asks here; whoever rewrites its segments does so too, and looks deeper.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.segments.shared_bytes import kept_of

TRACED: Final = ("spans", "logs")
"""Tables whose rows belong to a trace as a whole."""
TOLD: Final = ("verdicts", "events", "incidents")
"""Tables whose sentences may name a request."""
INSTEAD: Final = "(erased)"
"""Stands in a sentence where a name stood."""
_WORD: Final = re.compile(r"[^\s,;()\[\]'\"`]+")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
TRACE_BYTES: Final = 16
_LONGEST_NAME: Final = 256
_LONGEST_SENTENCE: Final = 1 << 16
_KNOWN_NAMES: Final = 1 << 16


class Kind(StrEnum):
    """What was asked to be erased."""

    REQUEST = "request"
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class Erasure:
    """One order to erase. It names nothing: names are digests, with the store's salt."""

    kind: Kind
    digest: str
    asked_unix_ns: int
    due_unix_ns: int
    """By then the bytes are to be gone."""
    by: str
    traces: tuple[str, ...] = ()
    """Digests of the traces that a request was part of."""
    epochs: tuple[int, ...] = ()
    """Processes all of whose rows go."""
    runs: tuple[str, ...] = ()
    """Runs whose verdicts go: all their ranks were a tenant's."""
    sent: tuple[tuple[str, int, int], ...] = ()
    """(table, epoch, row_seq): of a tenant, rows of others' processes that have its name, before this one."""


def digest(salt: bytes, name: str) -> str:
    """Return what stands for a name: 32 hex digits, which tell nothing to whoever cannot guess the name."""
    return hmac.new(salt, name.encode(), hashlib.sha256).hexdigest()[:32]


class Erased:
    """Everything that was ordered to be erased from one store. False where that is nothing."""

    def __init__(self, salt: bytes = b"", erasures: Sequence[Erasure] = ()) -> None:
        self.salt = salt
        self.erasures = tuple(erasures)
        self._names = frozenset(e.digest for e in erasures if e.kind is Kind.REQUEST)
        self._traces = frozenset(trace for e in erasures for trace in e.traces)
        self._epochs = frozenset(epoch for e in erasures for epoch in e.epochs)
        self._sent = {(table, epoch, e.digest): before for e in erasures for table, epoch, before in e.sent}
        self._runs = tuple(run for e in erasures for run in e.runs)
        self._digests: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self.erasures)

    def left(self, table: str, epoch: int, data: pa.RecordBatch, *, deep: bool = False) -> pa.RecordBatch:
        """Return what may be read of rows of one process: the same object where that is all of them.

        deep: also look into the original bytes of spans and logs, for those who remove them.
        """
        if not data.num_rows or not self:
            return data
        if epoch in self._epochs:
            return data.slice(0, 0)
        if not self._names and not self._runs and not self._sent:
            return data
        gone = self._gone(table, data, deep) | self._sent_by_erased(table, epoch, data)
        if gone.any():
            data = kept_of(data, pa.array(~gone))
        return self._without_names(table, data)

    def has_process(self, epoch: int) -> bool:
        """Tell whether all of a process goes."""
        return epoch in self._epochs

    @property
    def has_processes(self) -> bool:
        """Tell whether all of any process goes."""
        return bool(self._epochs)

    def has_verdict(self, name: str) -> bool:
        """Tell whether a verdict goes, since it is of a run that was an erased tenant's alone."""
        return bool(self._runs) and name.startswith(self._runs)

    def has_sent(self, table: str, epoch: int, row_seq: int, tenant: str | None) -> bool:
        """Tell whether a row that came by OTLP goes with its tenant."""
        if tenant is None:
            return False
        return row_seq < self._sent.get((table, epoch, self._digest(tenant)), 0)

    def told(self, text: str) -> str:
        """Return a sentence without the names of erased requests."""
        return self._told(text, ()) or ""

    def is_said_in(self, message: bytes) -> bool:
        """Tell whether a protobuf message says an erased request's name or trace anywhere: as a value, or as a word."""
        return any(self._is_said(value) for value in strings_in(message))

    def _is_said(self, value: bytes) -> bool:
        if len(value) == TRACE_BYTES and self._digest(value.hex()) in self._traces:
            return True
        if len(value) > _LONGEST_SENTENCE:
            return False
        text = value.decode(errors="replace")
        if len(value) <= _LONGEST_NAME and self._is_erased(text):
            return True
        if _CONTROL.search(text):  # a message: what it says comes by itself
            return False
        words = (word.rstrip(".:") for word in _WORD.findall(text))
        return any(self._is_erased(word) or self._digest(word) in self._traces for word in words)

    def _gone(self, table: str, data: pa.RecordBatch, deep: bool) -> NDArray[np.bool_]:
        gone = np.zeros(data.num_rows, np.bool_)
        columns = data.schema.names
        if "request" in columns:
            gone |= self._is_named(data.column("request"), self._names)
        if table in TRACED:
            gone |= self._is_named(data.column("trace_id"), self._traces)
            if deep:
                gone |= np.array([self._is_inside(value) for value in data.column("otlp").to_pylist()], np.bool_)
        if table == "verdicts" and self._runs:
            names = data.column("verdict").to_pylist()
            gone |= np.array([self.has_verdict(str(name)) for name in names], np.bool_)
        return gone

    def _sent_by_erased(self, table: str, epoch: int, data: pa.RecordBatch) -> NDArray[np.bool_]:
        gone = np.zeros(data.num_rows, np.bool_)
        for (of_table, of_epoch, tenant), before in self._sent.items():
            if (of_table, of_epoch) == (table, epoch):
                is_named = self._is_named(data.column("tenant"), frozenset({tenant}))
                gone |= is_named & (np.asarray(data.column("row_seq")) < before)
        return gone

    def _without_names(self, table: str, data: pa.RecordBatch) -> pa.RecordBatch:
        if table == "steps":
            return self._without_row_maps(data)
        if table in TOLD and self._names:
            rows = data.to_pylist()
            told = [self._without_words(row) for row in rows]
            return data if told == rows else pa.RecordBatch.from_pylist(told, schema=data.schema)
        return data

    def _without_row_maps(self, data: pa.RecordBatch) -> pa.RecordBatch:
        """Take the entries of erased requests out of the row maps of steps; the steps stay."""
        place = data.schema.get_field_index("rows")
        maps = data.column(place)
        entries = maps.flatten()
        kept = ~self._is_named(entries.field("request"), self._names)
        if kept.all():
            return data
        of = np.asarray(pc.list_parent_indices(maps))[kept]
        offsets = np.concatenate(([0], np.cumsum(np.bincount(of, minlength=data.num_rows)))).astype(np.int32)
        fewer = pa.ListArray.from_arrays(
            pa.array(offsets), entries.filter(pa.array(kept)), type=maps.type, mask=pc.is_null(maps)
        )
        return data.set_column(place, data.schema.field(place), fewer)

    def _without_words(self, row: dict[str, Any]) -> dict[str, Any]:
        named = [name for name in row.get("requests") or () if self._is_erased(name)]
        found: dict[str, Any] = {name: self._told(row[name], named) for name in ("text", "remedy") if name in row}
        if row.get("further"):
            found["further"] = [self._told(text, named) for text in row["further"]]
        if named:
            found["requests"] = [name for name in row["requests"] if name not in named]
        return {**row, **found}

    def _told(self, text: str | None, named: Iterable[str]) -> str | None:
        if not text:
            return text
        for name in named:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", INSTEAD, text)
        return _WORD.sub(self._word, text)

    def _word(self, found: re.Match[str]) -> str:
        word = found[0]
        bare = word.rstrip(".:")
        return INSTEAD + word[len(bare) :] if self._is_erased(bare) else word

    def _is_erased(self, name: str) -> bool:
        return self._digest(name) in self._names

    def _is_inside(self, otlp: bytes | None) -> bool:
        """Tell whether a protobuf message has a string that is an erased request's name, at whatever depth."""
        return any(
            len(value) <= _LONGEST_NAME and self._is_erased(value.decode(errors="replace"))
            for value in strings_in(otlp or b"")
        )

    def _is_named(self, values: pa.Array, digests: frozenset[str]) -> NDArray[np.bool_]:
        found = [name for name in pc.unique(values).to_pylist() if name is not None and self._digest(name) in digests]
        if not found:
            return np.zeros(len(values), np.bool_)
        return np.asarray(pc.is_in(values, pa.array(found, values.type)))

    def _digest(self, name: str) -> str:
        known = self._digests.get(name)
        if known is None:
            if len(self._digests) >= _KNOWN_NAMES:
                self._digests.clear()
            known = self._digests[name] = digest(self.salt, name)
        return known


def strings_in(message: bytes, depth: int = 16) -> Iterator[bytes]:
    """Yield each length-delimited field of a protobuf message, and what those hold in turn."""
    at = 0
    while depth and at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 2:
            num_bytes, at = _varint(message, at)
            if num_bytes > len(message) - at:
                return
            yield message[at : at + num_bytes]
            yield from strings_in(message[at : at + num_bytes], depth - 1)
            at += num_bytes
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            return


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    return value, len(data)
