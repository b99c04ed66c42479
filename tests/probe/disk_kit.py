"""A disk that gets full: a real file system of a few MiB, and a file that takes all its room."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[str]:
    """Make `folder`, as a file system of its own of this size; yields why not where none can be mounted, else ""."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    ran = subprocess.run(mount, capture_output=True, text=True)
    try:
        yield ran.stderr.strip() or "mount failed" if ran.returncode else ""
    finally:
        if not ran.returncode:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of this size; skips, saying why, where none can be mounted."""
    with mounted(folder, num_bytes) as why_not:
        if why_not:
            pytest.skip(f"a small tmpfs cannot be mounted here: {why_not}")
        yield folder


def fill(disk: Path) -> Path:
    """Take all the room of a disk with one file."""
    with (disk / "ballast").open("wb") as file, suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(65536))
    return disk / "ballast"


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only for everybody, root too, by a mount over it; skips, saying why, where none can be."""
    for options in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
        ran = subprocess.run(["mount", *options], capture_output=True, text=True)
        if ran.returncode:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)
            pytest.skip(f"a folder cannot be mounted read-only here: {ran.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no sync succeed, and the first file that is closed say so once more, as one on a network does."""
    close, closed = os.close, list[int]()

    def broken(fd: int) -> None:  # a disk that fails cannot be had here
        raise OSError(errno.EIO, "Input/output error")

    def broken_once(fd: int) -> None:
        close(fd)
        closed.append(fd)
        if len(closed) == 1:
            broken(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        patched.setattr(os, "close", broken_once)
        yield
