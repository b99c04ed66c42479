"""`STORE/v1/erased.json`: what was ordered to be erased. Readers hide it from the moment it is written."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from insitu.segments import disk
from insitu.segments.erasure import Erased, Erasure, Kind
from insitu.segments.layout import FORMAT, read_file, write_file

SCHEMA: Final = "insitu.erased/1"


class ErasedUnreadable(OSError):
    """What was erased cannot be told, so nothing of the store may be shown."""


class ErasedFile:
    """The orders of one store, read again when the file has changed. For any number of readers and one writer."""

    def __init__(self, store: Path) -> None:
        self.path = store / FORMAT / "erased.json"
        self._seen: tuple[int, int, int] | None = None
        self._erased = Erased()

    def read(self) -> Erased:
        """Return what is erased now; a call costs one stat. Raises ErasedUnreadable."""
        try:
            found = disk.stat(self.path)
        except FileNotFoundError:
            self._seen, self._erased = None, Erased()
            return self._erased
        seen = found.st_ino, found.st_mtime_ns, found.st_size
        if seen != self._seen:
            self._erased, self._seen = self._load(), seen
        return self._erased

    def _load(self) -> Erased:
        try:
            return parse(json.loads(read_file(self.path)))
        except (OSError, ValueError) as error:
            raise ErasedUnreadable(
                f"{self.path} cannot be read ({error}), so what was erased could not be hidden; restore that file"
            ) from None

    def add(self, make: Erasure) -> Erased:
        """Add one order, durably. The same again keeps what was known of it: its rows may be gone. Raises OSError."""
        now = self.read()
        others = [e for e in now.erasures if (e.kind, e.digest) != (make.kind, make.digest)]
        for known in now.erasures:
            if known not in others:
                make = replace(
                    make,
                    traces=tuple(sorted({*known.traces, *make.traces})),
                    epochs=tuple(sorted({*known.epochs, *make.epochs})),
                    runs=tuple(sorted({*known.runs, *make.runs})),
                    sent=_latest(known.sent, make.sent),
                )
        self._write(document(now.salt, [*others, make]))
        return self.read()

    def salt(self) -> bytes:
        """Return the store's salt; the first call makes it."""
        now = self.read()
        if not now.salt:
            self._write(document(secrets.token_bytes(16), ()))
            now = self.read()
        return now.salt

    def _write(self, said: dict[str, Any]) -> None:
        write_file(self.path, json.dumps(said).encode())


def _latest(*told: tuple[tuple[str, int, int], ...]) -> tuple[tuple[str, int, int], ...]:
    latest: dict[tuple[str, int], int] = {}
    for table, epoch, before in (each for some in told for each in some):
        latest[table, epoch] = max(before, latest.get((table, epoch), 0))
    return tuple((table, epoch, before) for (table, epoch), before in sorted(latest.items()))


def document(salt: bytes, erasures: tuple[Erasure, ...] | list[Erasure]) -> dict[str, Any]:
    """Return what the file says."""
    orders = [
        {
            "kind": str(e.kind),
            "digest": e.digest,
            "asked_unix_ns": e.asked_unix_ns,
            "due_unix_ns": e.due_unix_ns,
            "by": e.by,
            "traces": list(e.traces),
            "epochs": [str(epoch) for epoch in e.epochs],
            "runs": list(e.runs),
            "sent": [{"table": table, "epoch": str(epoch), "before": before} for table, epoch, before in e.sent],
        }
        for e in erasures
    ]
    return {"schema": SCHEMA, "salt": salt.hex(), "erasures": orders}


def parse(found: Any) -> Erased:
    """Return what a document says. Raises ValueError where it is none of ours."""
    try:
        if found["schema"] != SCHEMA:
            raise ValueError(f"it is no {SCHEMA}")
        orders = [
            Erasure(
                Kind(row["kind"]),
                row["digest"],
                int(row["asked_unix_ns"]),
                int(row["due_unix_ns"]),
                row["by"],
                tuple(row["traces"]),
                tuple(int(epoch) for epoch in row["epochs"]),
                tuple(row["runs"]),
                tuple((of["table"], int(of["epoch"]), int(of["before"])) for of in row.get("sent", ())),
            )
            for row in found["erasures"]
        ]
        return Erased(bytes.fromhex(found["salt"]), orders)
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no {SCHEMA}: {error!r}") from None
