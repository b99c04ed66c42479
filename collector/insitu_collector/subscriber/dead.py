"""Dead letters: requests that a receiver will never take, kept as they were, within bounds, without what is erased.

`STORE/v1/dead/<16 hex digits of the destination>/<unix_ns>-<pid>-<number>.letter`: a line of JSON, then the request.
Whoever changes a folder of letters has its lock meanwhile: a letter is put before an erasure looks through them, or
after, and then without what is erased.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from insitu.forwarding.cursor import id_of
from insitu.segments.erased_file import ErasedFile
from insitu.segments.erasure import Erased
from insitu.segments.layout import FORMAT, make_folder
from insitu_collector.subscriber.letter import (
    DRAFT,
    SUFFIX,
    BadLetter,
    Damaged,
    Letter,
    letter_of,
    num_items_in,
    read_letter,
    write_letter,
)
from insitu_collector.subscriber.payloads import Origin, Payload

MAX_BYTES: Final = 64 << 20
MAX_LETTERS: Final = 10_000
"""Of one destination; beyond either the oldest go, and are counted."""


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
        path = self._folder / f"{name}{SUFFIX}"
        make_folder(self._folder)
        with _alone(self._folder):
            if self._number == 1:
                _remove_drafts(self._folder)
            left = _left(letter_of(name, self._to, payload, reason, text, now), payload, self._erased.read())
            if left is None:
                return 0
            self._sizes[path] = write_letter(path, *left)
            return self._make_room()

    def _make_room(self) -> int:
        num_gone = 0
        while len(self._sizes) > 1 and (
            len(self._sizes) > self._max_letters or sum(self._sizes.values()) > self._max_bytes
        ):
            oldest = min(self._sizes)
            del self._sizes[oldest]
            if oldest.exists():  # somebody may have replayed or dropped it
                num_gone += num_items_in(oldest)
                oldest.unlink(missing_ok=True)
        return num_gone


def root_of(store: Path) -> Path:
    """Return where the dead letters of a store lie."""
    return store / FORMAT / "dead"


def listed(store: Path, to: str | None = None) -> Iterator[tuple[Path, Letter | Damaged]]:
    """Yield the letters of a store (or of one destination), oldest first of each, without what is erased.

    Raises ErasedUnreadable.
    """
    erased = ErasedFile(store)
    for path in _paths(store, to):
        with suppress(FileNotFoundError):
            try:
                left = _left(*read_letter(path), erased.read())
            except BadLetter as error:
                yield path, Damaged(path.stem, path.stat().st_size, error.text)
            else:
                if left is not None:
                    yield path, left[0]


def read(store: Path, path: Path) -> tuple[Letter, Payload]:
    """Return a letter and its request, without what is erased.

    Raises BadLetter, FileNotFoundError where nothing of it is there (any more), ErasedUnreadable.
    """
    left = _left(*read_letter(path), ErasedFile(store).read())
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
            letter, payload = read_letter(path)
            left = _left(letter, payload, erased)
            num_gone += letter.num_items - (0 if left is None else left[0].num_items)
    return num_gone


def holding(store: Path, erased: Erased) -> list[Path]:
    """Return the letters that hold something of what is erased."""
    found = []
    for path in _paths(store, None):
        with suppress(FileNotFoundError, BadLetter):
            kept = read_letter(path)
            if _left(*kept, erased) != kept:
                found.append(path)
    return found


def origins(store: Path) -> Iterator[Origin]:
    """Yield which rows letters were made of, erased or not, where others had sent them."""
    for path in _paths(store, None):
        with suppress(FileNotFoundError, BadLetter):
            letter, _ = read_letter(path)
            if letter.of is not None:
                yield letter.of


def _remove_drafts(folder: Path) -> None:
    """Remove what writers that died had begun: who lives has the lock."""
    for draft in folder.glob(f"*{DRAFT}"):
        draft.unlink()


def _erase_in(path: Path, erased: Erased) -> int:
    try:
        letter, payload = read_letter(path)
    except BadLetter:
        path.unlink()
        return 0
    left = _left(letter, payload, erased)
    if left is None:
        path.unlink()
        return letter.num_items
    if left[0] != letter:
        write_letter(path, *left)
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
    return letter_of(letter.name, letter.to, left, letter.reason, text, letter.unix_ns), left


def _paths(store: Path, to: str | None) -> Iterator[Path]:
    folders = [root_of(store) / id_of(to)] if to is not None else _folders(root_of(store))
    for folder in folders:
        yield from _files(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


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
