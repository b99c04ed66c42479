"""A file or a folder that is there whole or not at all: written under another name, renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from insitu.segments.layout import is_full


@contextmanager
def whole(path: Path, *, folder: bool = False, force: bool = False) -> Iterator[Path]:
    """Give a path to write to beside `path`; it takes that name when the block ends well, and is removed otherwise.

    force: an existing file is replaced. Of an existing folder, files of the same name are; the rest stays.
    Raises FileExistsError, FileNotFoundError without the folder to write into, OSError when it cannot be written to.
    """
    if not os.path.isdir(path.parent):  # of a name that is too long `Path.is_dir` raises
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into; make it, or name another by --out")
    if os.path.exists(path) and not force:
        raise FileExistsError(f"{path} exists; --force replaces it, --out names another place")
    if os.path.exists(path) and path.is_dir() != folder:
        raise FileExistsError(f"{path} is a {'folder' if path.is_dir() else 'file'} already; --out names another place")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if folder:
            part.mkdir()
        yield part
        _put(part, path)
    except OSError as error:
        if error.errno is None or not _is_of(part, error):
            raise
        why = f"{os.strerror(error.errno)} (--out names another place)"
        raise OSError(error.errno, why, str(path)) from None  # the name that people gave
    finally:
        if os.path.isdir(part):
            shutil.rmtree(part)
        elif os.path.exists(part):
            part.unlink()


def _is_of(part: Path, error: OSError) -> bool:
    """Return whether it is the output that the system refuses: what is read meanwhile may fail as well."""
    return is_full(error) if error.filename is None else str(error.filename).startswith(str(part))


def _put(part: Path, path: Path) -> None:
    if part.is_dir() and path.is_dir():
        for file in sorted(part.iterdir()):
            file.replace(path / file.name)
    else:
        part.replace(path)
