"""Reading a sealed segment as it was written, whole or not at all. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from insitu.records import table_spec
from insitu.segments import disk
from insitu.segments.message import MAGIC, RECORD_BATCH, SCHEMA, Head, read_head
from insitu.segments.reader import FIRST_MESSAGE, is_footer
from insitu.segments.stored import Stored, is_known, newer_format, newer_text, stored_batch

REPLACES: Final = "insitu.replaces"
"""Schema metadata: numbers of the segments that this one was made of, with spaces between."""
REPLACED_BEFORE: Final = "insitu.replaced_before"
"""... and of those that these, in turn, had been made of."""


_BROKEN: Final = (ValueError, OSError, pa.ArrowException)
"""What parsing bytes in memory raises: with damaged metadata pyarrow's is an OSError, though no disk has failed."""


class NotWhole(ValueError):
    """A segment that cannot be taken as it is; the text says why, in one line."""


class NewerFormat(NotWhole):
    """A segment of a format that this version does not know."""


class WholeSegment:
    """One sealed segment over a map of its file: what is read is in memory a batch at a time.

    Unlinking the file meanwhile changes nothing. Raises NotWhole when it is damaged at its head, NewerFormat, KeyError
    for an unknown table, OSError.
    """

    def __init__(self, path: Path, table: str) -> None:
        self._spec = table_spec(table)
        try:
            self._view = disk.buffer(path)
        except ValueError as error:  # nothing is in it
            raise NotWhole(_line(error)) from None
        self._file = pa.py_buffer(self._view)
        try:
            head = self._head(FIRST_MESSAGE)
            if head.kind != SCHEMA or bytes(self._view[: len(MAGIC)]) != MAGIC:
                raise NotWhole("it does not begin with a schema")
            schema = pa.ipc.read_schema(self._file.slice(FIRST_MESSAGE, head.num_bytes))
            told = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
            self._replaces, self._replaced_before = (_numbers(told.get(key, "")) for key in (REPLACES, REPLACED_BEFORE))
        except _BROKEN as error:
            raise NotWhole(_line(error)) from None
        if version := newer_format(schema):
            raise NewerFormat(newer_text(version))
        if not _is_of(schema, table):  # the checksums of batches do not cover names of columns
            raise NotWhole("its columns are not those of its table")
        self.metadata: dict[str, str] = told
        self.schema: pa.Schema = schema.remove_metadata()
        self._first_batch = FIRST_MESSAGE + head.num_bytes

    @property
    def num_bytes(self) -> int:
        return int(self._file.size)

    @property
    def buffer(self) -> pa.Buffer:
        """The whole file."""
        return self._file

    @property
    def replaces(self) -> frozenset[int]:
        """Numbers of the segments it was made of."""
        return self._replaces

    @property
    def replaced_before(self) -> frozenset[int]:
        """Numbers of the segments that those had been made of."""
        return self._replaced_before

    def batches(self) -> Iterator[Stored]:
        """Yield its batches, each validated and its checksum compared. Raises NotWhole at the first thing wrong."""
        end = self._first_batch
        for at, head in self.heads():
            yield self._stored(at, head)
            end = at + head.num_bytes
        if not is_footer(self._view, end + self._head(end).num_bytes):
            raise NotWhole("its footer is damaged")

    def heads(self) -> Iterator[tuple[int, Head]]:
        """Yield where each batch lies, and its head; no row is read. Raises NotWhole where the chain breaks."""
        at = self._first_batch
        try:
            while not (head := self._head(at)).is_end:
                if head.kind != RECORD_BATCH:
                    raise NotWhole(f"a message of kind {head.kind}")
                yield at, head
                at += head.num_bytes
        except _BROKEN as error:
            raise NotWhole(f"at byte {at}: {_line(error)}") from None

    def _stored(self, at: int, head: Head) -> Stored:
        try:
            return stored_batch(self._file.slice(at, head.num_bytes), head, self.schema, self._spec)
        except _BROKEN as error:
            raise NotWhole(f"at byte {at}: {_line(error)}") from None

    def _head(self, at: int) -> Head:
        head = read_head(self._view, at)
        if head is None or at + head.num_bytes > len(self._view):
            raise NotWhole("it ends too early")
        return head


def numbers_replaced(path: Path, table: str) -> frozenset[int]:
    """Return the numbers of the segments that one was made of; none where that cannot be told."""
    try:
        return WholeSegment(path, table).replaces
    except (NotWhole, KeyError, OSError):
        return frozenset()


def _is_of(schema: pa.Schema, table: str) -> bool:
    try:
        return is_known(schema, table)
    except UnicodeDecodeError:  # a name of a column, as it is looked at
        return False


def _numbers(text: str) -> frozenset[int]:
    return frozenset(int(number) for number in text.split())


def _line(error: Any) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
