"""Dead letters: requests that a receiver will never take, kept as they were, within bounds, without what is erased.

`STORE/v1/dead/<16 hex digits of the destination>/<unix_ns>-<pid>-<number>.letter`: a line of JSON, then the request.
Whoever changes a folder of letters has its lock meanwhile: a letter is put before an erasure looks through them, or
after, and then without what is erased.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from insitu.forwarding.cursor import id_of
from insitu.segments.erased_file import ErasedFile
from insitu.segments.erasure import Erased
from insitu.segments.layout import FORMAT, make_folder, sync_folder
from insitu_collector.subscriber.payloads import Origin, Payload

SCHEMA: Final = "insitu.dead/1"
MAX_BYTES: Final = 64 << 20
MAX_LETTERS: Final = 10_000
"""Of one destination; beyond either the oldest go, and are counted."""
_SUFFIX: Final = ".letter"
_DRAFT: Final = ".draft"
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
    of: Origin | None = None
    """Which rows they are, where others had sent them."""

    def to_json(self) -> dict[str, Any]:
        """Return what is said of it in JSON."""
        of = None if self.of is None else {**asdict(self.of), "epoch": str(self.of.epoch)}
        return {**asdict(self), "of": of}


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
        self._erased = ErasedFile(store)
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
        path = self._folder / f"{name}{_SUFFIX}"
        make_folder(self._folder)
        with _alone(self._folder):
            if self._number == 1:
                _remove_drafts(self._folder)
            left = _left(_letter(name, self._to, payload, reason, text, now), payload, self._erased.read())
            if left is None:
                return 0
            self._sizes[path] = _write(path, *left)
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
    """Yield the letters of a store (or of one destination), oldest first of each; what is none, or erased, is left out.

    Raises ErasedUnreadable.
    """
    erased = ErasedFile(store)
    for path in _paths(store, to):
        with suppress(FileNotFoundError, BadLetter):
            if not erased.read():
                with path.open("rb") as file:
                    letter = _head(path, file.readline(_MAX_HEAD))
            elif (left := _left(*_read(path), erased.read())) is not None:
                letter = left[0]
            else:
                continue
            yield path, letter


def read(store: Path, path: Path) -> tuple[Letter, Payload]:
    """Return a letter and its request, without what is erased.

    Raises BadLetter, FileNotFoundError where nothing of it is there (any more), ErasedUnreadable.
    """
    left = _left(*_read(path), ErasedFile(store).read())
    if left is None:
        raise FileNotFoundError(f"{path} is erased")
    return left


def remove(path: Path) -> None:
    """Remove a letter for good."""
    with suppress(FileNotFoundError), _alone(path.parent):
        path.unlink()


def erase(store: Path, erased: Erased) -> int:
    """Take what is erased out of the letters; return how many items that were. Raises OSError.

    A letter that cannot be read goes: nobody can tell whether it holds any of it.
    """
    num_gone = 0
    for folder in _folders(root_of(store)):
        with _alone(folder):
            _remove_drafts(folder)
            num_gone += sum(_erase_in(path, erased) for path in _files(folder))
    return num_gone


def would_erase(store: Path, erased: Erased) -> int:
    """Return how many items `erase` would take out. Changes nothing."""
    num_gone = 0
    for path in _paths(store, None):
        with suppress(FileNotFoundError, BadLetter):
            letter, payload = _read(path)
            left = _left(letter, payload, erased)
            num_gone += letter.num_items - (0 if left is None else left[0].num_items)
    return num_gone


def holding(store: Path, erased: Erased) -> list[Path]:
    """Return the letters that hold something of what is erased."""
    found = []
    for path in _paths(store, None):
        with suppress(FileNotFoundError, BadLetter):
            kept = _read(path)
            if _left(*kept, erased) != kept:
                found.append(path)
    return found


def origins(store: Path) -> Iterator[Origin]:
    """Yield which rows letters were made of, erased or not, where others had sent them."""
    for path in _paths(store, None):
        with suppress(FileNotFoundError, BadLetter):
            letter, _ = _read(path)
            if letter.of is not None:
                yield letter.of


def _remove_drafts(folder: Path) -> None:
    """Remove what writers that died had begun: who lives has the lock."""
    for draft in folder.glob(f"*{_DRAFT}"):
        draft.unlink()


def _erase_in(path: Path, erased: Erased) -> int:
    try:
        letter, payload = _read(path)
    except BadLetter:
        path.unlink()
        return 0
    left = _left(letter, payload, erased)
    if left is None:
        path.unlink()
        return letter.num_items
    if left[0] != letter:
        _write(path, *left)
    return letter.num_items - left[0].num_items


def _left(letter: Letter, payload: Payload, erased: Erased) -> tuple[Letter, Payload] | None:
    """Return what an erasure leaves of a letter; None where that is nothing."""
    if not erased:
        return letter, payload
    from insitu_collector.subscriber.erased_items import left_of

    left = left_of(payload, erased)
    if not left.num_items:
        return None
    text = erased.told(letter.text)
    if left is payload and text == letter.text:
        return letter, payload
    return _letter(letter.name, letter.to, left, letter.reason, text, letter.unix_ns), left


def _letter(name: str, to: str, payload: Payload, reason: str, text: str, unix_ns: int) -> Letter:
    body = payload.body
    return Letter(
        name, to, payload.signal, reason, text, unix_ns, payload.num_items, len(body), zlib.crc32(body), payload.of
    )


def _read(path: Path) -> tuple[Letter, Payload]:
    """Return a letter and its request as they are kept. Raises BadLetter and FileNotFoundError."""
    line, _, body = path.read_bytes().partition(b"\n")
    letter = _head(path, line)
    if len(body) != letter.num_bytes or zlib.crc32(body) != letter.crc32:
        raise BadLetter(f"{path} is damaged: its bytes are not those that were written")
    return letter, Payload(letter.signal, body, letter.num_items, letter.of)


def _write(path: Path, letter: Letter, payload: Payload) -> int:
    """Write a letter, durably; return its bytes. Raises OSError."""
    head = {"schema": SCHEMA, **letter.to_json()}
    del head["name"]
    content = json.dumps(head).encode() + b"\n" + payload.body
    draft = path.with_suffix(_DRAFT)
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fdatasync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)
    return len(content)


def _head(path: Path, line: bytes) -> Letter:
    try:
        found: dict[str, Any] = json.loads(line)
        if found.pop("schema") != SCHEMA:
            raise BadLetter(f"{path} is of another version")
        of = found.pop("of", None)
        return Letter(path.stem, **found, of=None if of is None else Origin(**{**of, "epoch": int(of["epoch"])}))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadLetter(f"{path} is no letter ({error})") from None


def _num_items(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return _head(path, file.readline(_MAX_HEAD)).num_items
    except (FileNotFoundError, BadLetter):
        return 0


def _paths(store: Path, to: str | None) -> Iterator[Path]:
    folders = [root_of(store) / id_of(to)] if to is not None else _folders(root_of(store))
    for folder in folders:
        yield from _files(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if path.is_dir())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is there."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
