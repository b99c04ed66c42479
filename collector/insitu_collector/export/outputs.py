"""A file or a folder that is there whole or not at all: written under another name, renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, *, folder: bool = False, force: bool = False) -> Iterator[Path]:
    """Give a path to write to beside `path`; it takes that name when the block ends well, and is removed otherwise.

    force: an existing file is replaced. Of an existing folder, files of the same name are; the rest stays.
    Raises FileExistsError, FileNotFoundError without the folder to write into, OSError when it cannot be written to.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into; make it, or name another by --out")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; --force replaces it, --out names another place")
    if path.exists() and path.is_dir() != folder:
        raise FileExistsError(f"{path} is a {'folder' if path.is_dir() else 'file'} already; --out names another place")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if folder:
            part.mkdir()
        yield part
        _put(part, path)
    except OSError as error:
        if error.filename is None or not str(error.filename).startswith(str(part)):
            raise
        raise OSError(error.errno, _why(error), str(path)) from None  # the name that people gave
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        elif part.exists():
            part.unlink()


def _why(error: OSError) -> str:
    reason = error.strerror or "it cannot be written"
    return (
        f"{reason} (--out names another place)" if error.errno in (errno.EROFS, errno.EACCES, errno.ENOSPC) else reason
    )


def _put(part: Path, path: Path) -> None:
    if part.is_dir() and path.is_dir():
        for file in sorted(part.iterdir()):
            file.replace(path / file.name)
    else:
        part.replace(path)
