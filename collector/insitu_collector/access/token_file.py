"""The tokens file on disk: read whole, only where it is a secret of its owner; appended to."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from insitu_collector.access.tokens import BadTokens, Entry, parse_tokens

MODE: Final = 0o600
MAX_BYTES: Final = 4 << 20


def read_tokens(path: Path) -> tuple[Entry, ...]:
    """Return the entries. Raises BadTokens, one line, with the file's name in it."""
    try:
        with path.open("rb") as file:
            _check_mode(os.fstat(file.fileno()), path)
            # Whoever appends holds the lock: nobody reads half an entry. Who locks it for good stops no collector.
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadTokens(f"tokens file {path} cannot be read: {reason}; `insitu token new` makes one") from None
    return _parsed(text, path)


def _parsed(data: bytes, path: Path) -> tuple[Entry, ...]:
    try:
        if len(data) > MAX_BYTES:
            raise BadTokens(f"more than {MAX_BYTES} bytes; give a smaller one")
        return parse_tokens(data.decode())
    except UnicodeDecodeError:
        raise BadTokens(f"tokens file {path}: not UTF-8; write it as `insitu token new` does") from None
    except BadTokens as error:
        raise BadTokens(f"tokens file {path}: {error}") from None


def _check_mode(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BadTokens(f"tokens file {path} is no ordinary file; name another")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise BadTokens(f"tokens file {path} has mode {mode:04o}, so others may use it; chmod 600 {path}")
    if found.st_uid not in (os.geteuid(), 0):
        raise BadTokens(f"tokens file {path} belongs to another user; chown it to the one that collects")


def append_entry(path: Path, entry: Entry) -> None:
    """Append an entry, and make the file where there is none. Raises BadTokens where it has one of that name."""
    try:
        number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, MODE)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadTokens(f"tokens file {path} cannot be written: {reason}; name another with --tokens") from None
    with os.fdopen(number, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _check_mode(os.fstat(number), path)
        before = file.read(MAX_BYTES + 1)
        _check_free(_parsed(before, path), entry, path)
        gap = b"" if not before else b"\n" if before.endswith(b"\n") else b"\n\n"
        added = gap + entry.toml().encode()
        _parsed(before + added, path)
        file.write(added)
        file.flush()
        os.fsync(number)


def _check_free(entries: Sequence[Entry], entry: Entry, path: Path) -> None:
    for other in entries:
        if other.name == entry.name:
            raise BadTokens(f"{path} has an entry {entry.name}; give another name, or take that one out")
