"""Dead letters: requests that a receiver will never take, kept as they were, within bounds.

`STORE/v1/dead/<16 hex digits of the destination>/<unix_ns>-<pid>-<number>.letter`: a line of JSON, then the request.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from insitu.forwarding.cursor import id_of
from insitu.segments.layout import FORMAT, make_folder, sync_folder
from insitu_collector.subscriber.payloads import Payload

SCHEMA: Final = "insitu.dead/1"
MAX_BYTES: Final = 64 << 20
MAX_LETTERS: Final = 10_000
"""Of one destination; beyond either the oldest go, and are counted."""
_SUFFIX: Final = ".letter"
_MAX_HEAD: Final = 4096


class BadLetter(ValueError):
    """A file that is no letter, or whose bytes changed."""


@dataclass(frozen=True, slots=True)
class Letter:
    """What one dead letter says of itself."""

    name: str
    """Of its file, without suffix: the same for good."""
    to: str
    """The destination that would not take it."""
    signal: str
    reason: str
    text: str
    """What the destination said."""
    unix_ns: int
    """When it was given up."""
    num_items: int
    num_bytes: int
    crc32: int


class DeadLetters:
    """Those of one destination. A subscriber and a replay may write side by side."""

    def __init__(
        self,
        store: Path,
        to: str,
        *,
        max_bytes: int = MAX_BYTES,
        max_letters: int = MAX_LETTERS,
        unix_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._to = to
        self._folder = root_of(store) / id_of(to)
        self._max_bytes = max_bytes
        self._max_letters = max_letters
        self._unix_clock_ns = unix_clock_ns
        self._sizes = {path: path.stat().st_size for path in _files(self._folder)}
        self._number = 0
        self._pid = os.getpid()

    def put(self, payload: Payload, reason: str, text: str) -> int:
        """Keep one, durably; return how many items of older ones went for it. Raises OSError: it is not kept."""
        now, self._number = self._unix_clock_ns(), self._number + 1
        name = f"{now:020}-{self._pid}-{self._number}"
        body = payload.body
        letter = Letter(
            name, self._to, payload.signal, reason, text, now, payload.num_items, len(body), zlib.crc32(body)
        )
        head = {"schema": SCHEMA, **asdict(letter)}
        del head["name"]
        path, content = self._folder / f"{name}{_SUFFIX}", json.dumps(head).encode() + b"\n" + body
        _write(path, content)
        self._sizes[path] = len(content)
        return self._make_room()

    def _make_room(self) -> int:
        num_gone = 0
        while len(self._sizes) > 1 and (
            len(self._sizes) > self._max_letters or sum(self._sizes.values()) > self._max_bytes
        ):
            oldest = min(self._sizes)
            del self._sizes[oldest]
            if oldest.exists():  # somebody may have replayed or dropped it
                num_gone += _num_items(oldest)
                oldest.unlink(missing_ok=True)
        return num_gone


def root_of(store: Path) -> Path:
    """Return where the dead letters of a store lie."""
    return store / FORMAT / "dead"


def letters(store: Path, to: str | None = None) -> Iterator[tuple[Path, Letter]]:
    """Yield the letters of a store (or of one destination), oldest first of each; what is none is left out."""
    folders = [root_of(store) / id_of(to)] if to is not None else sorted(_folders(root_of(store)))
    for folder in folders:
        for path in _files(folder):
            try:
                with path.open("rb") as file:
                    yield path, _head(path, file.readline(_MAX_HEAD))
            except (FileNotFoundError, BadLetter):
                continue


def read(path: Path) -> tuple[Letter, Payload]:
    """Return a letter and its request. Raises BadLetter, and FileNotFoundError where it has gone."""
    line, _, body = path.read_bytes().partition(b"\n")
    letter = _head(path, line)
    if len(body) != letter.num_bytes or zlib.crc32(body) != letter.crc32:
        raise BadLetter(f"{path} is damaged: its bytes are not those that were written")
    return letter, Payload(letter.signal, body, letter.num_items)


def _head(path: Path, line: bytes) -> Letter:
    try:
        found: dict[str, Any] = json.loads(line)
        if found.pop("schema") != SCHEMA:
            raise BadLetter(f"{path} is of another version")
        return Letter(path.stem, **found)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadLetter(f"{path} is no letter ({error})") from None


def _num_items(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return _head(path, file.readline(_MAX_HEAD)).num_items
    except (FileNotFoundError, BadLetter):
        return 0


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))


def _folders(root: Path) -> list[Path]:
    return [path for path in root.glob("*") if path.is_dir()]


def _write(path: Path, content: bytes) -> None:
    make_folder(path.parent)
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fdatasync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)
