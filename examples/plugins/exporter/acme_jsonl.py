"""An exporter plug-in: records as lines of JSON, one file a table and process. How to write one: docs/extending.md."""

from __future__ import annotations

import base64
import errno
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from insitu.exporters import Ack, Batch, Level, Retry
from insitu.identity import Source
from insitu.vocabulary import DropReason


class JsonLines:
    """`jsonl:///FOLDER`. Bytes become base64, NaN and infinities what Python's `json` writes and reads."""

    def __init__(self, to: str, source: Source) -> None:
        self._folder = Path(urlsplit(to).netloc + urlsplit(to).path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._epoch = f"{source.epoch:016x}"

    def export(self, batch: Batch) -> Ack:
        """Append a batch. On disk when this returns; without room nothing of it is, and it is tried again."""
        lines = "".join(json.dumps(row, default=_text) + "\n" for row in batch.data.to_pylist())
        try:
            self._append(self._folder / f"{batch.table}-{self._epoch}.jsonl", lines.encode())
        except OSError as error:
            raise Retry(1.0, DropReason.DISK_FULL) from error
        return Ack(batch.stream, batch.seq, Level.DURABLE)

    def _append(self, path: Path, data: bytes) -> None:
        with path.open("ab", buffering=0) as file:
            begin = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, "no room for a whole batch")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(begin)  # else its rows would be there twice
                raise


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} is no JSON")
