"""One dead letter as a file: a line of JSON, then the request, with a checksum of that."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from insitu.segments.layout import sync_folder
from insitu_collector.subscriber.payloads import REQUESTS, Origin, Payload

SCHEMA: Final = "insitu.dead/1"
SUFFIX: Final = ".letter"
DRAFT: Final = ".draft"
_MAX_HEAD: Final = 1 << 14
"""A head is a destination, and 300 characters of what it said, in ASCII: 12 bytes each at most."""
_NUMBERS: Final = ("unix_ns", "num_items", "num_bytes", "crc32")
_TEXTS: Final = ("to", "signal", "reason", "text")


class BadLetter(ValueError):
    """A file that is no letter, or whose bytes changed."""

    def __init__(self, path: Path, text: str) -> None:
        """text: what is wrong with it."""
        super().__init__(f"{path} is damaged: {text}")
        self.text = text


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


@dataclass(frozen=True, slots=True)
class Damaged:
    """A letter that cannot be read: nobody can tell whose it is, or what it holds."""

    name: str
    num_bytes: int
    """Of its file."""
    text: str
    """What is wrong with it."""

    def to_json(self) -> dict[str, Any]:
        """Return what is said of it in JSON."""
        return asdict(self)


def letter_of(name: str, to: str, payload: Payload, reason: str, text: str, unix_ns: int) -> Letter:
    """Return what a letter with this request says of itself."""
    body = payload.body
    return Letter(
        name, to, payload.signal, reason, text, unix_ns, payload.num_items, len(body), zlib.crc32(body), payload.of
    )


def read_letter(path: Path) -> tuple[Letter, Payload]:
    """Return a letter and its request as they are kept. Raises BadLetter and FileNotFoundError."""
    line, _, body = path.read_bytes().partition(b"\n")
    letter = _head(path, line)
    if len(body) != letter.num_bytes or zlib.crc32(body) != letter.crc32:
        raise BadLetter(path, "its bytes are not those that were written")
    return letter, Payload(letter.signal, body, letter.num_items, letter.of)


def write_letter(path: Path, letter: Letter, payload: Payload) -> int:
    """Write a letter, durably; return its bytes. Raises OSError."""
    head = {"schema": SCHEMA, **letter.to_json()}
    del head["name"]
    content = json.dumps(head).encode() + b"\n" + payload.body
    draft = path.with_suffix(DRAFT)
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fdatasync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)
    return len(content)


def num_items_in(path: Path) -> int:
    """Return how many items a letter says it holds; 0 where that cannot be read."""
    try:
        with path.open("rb") as file:
            return _head(path, file.readline(_MAX_HEAD)).num_items
    except (FileNotFoundError, BadLetter):
        return 0


def _head(path: Path, line: bytes) -> Letter:
    try:
        found: dict[str, Any] = json.loads(line)
        if found.pop("schema") != SCHEMA:
            raise BadLetter(path, "it is of another version")
        of = found.pop("of", None)
        letter = Letter(path.stem, **found, of=None if of is None else Origin(**{**of, "epoch": int(of["epoch"])}))
        are_numbers = all(isinstance(getattr(letter, name), int) for name in _NUMBERS)
        are_texts = all(isinstance(getattr(letter, name), str) for name in _TEXTS)
        if not (are_numbers and are_texts and letter.signal in REQUESTS):
            raise _no_head(path)
    except BadLetter:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise _no_head(path) from None
    return letter


def _no_head(path: Path) -> BadLetter:
    return BadLetter(path, "its first line is no head of a letter")
