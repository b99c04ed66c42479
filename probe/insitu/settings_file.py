"""The file that settings are read from: `insitu.toml`, or `[tool.insitu]` in a `pyproject.toml`, which is not ours."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

FILE: Final = "insitu.toml"
PROJECT: Final = "pyproject.toml"
_OURS: Final = re.compile(r"^[ \t]*\[*[ \t]*tool[ \t]*\.[ \t]*[\"']?insitu\b", re.MULTILINE)
"""How settings of ours begin in a text that cannot be parsed."""


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """What the file of a folder says."""

    path: Path | None = None
    """None: no file says anything."""
    table: Mapping[str, Any] = field(default_factory=dict)
    unread: str = ""
    """One line where somebody else's file cannot be used and may have settings of ours; empty: none such."""


def read(folder: Path) -> SettingsFile:
    """Return what is set in a folder. Raises ValueError, one line, where `insitu.toml` or `[tool.insitu]` is wrong."""
    path = folder / FILE
    text = _text(path)
    if text is not None:
        return SettingsFile(path, _parse(path, text))
    return _of_project(folder / PROJECT)


def _of_project(path: Path) -> SettingsFile:
    """Return what somebody else's file sets. One without settings of ours is no matter, however broken it is."""
    try:
        text = _text(path)
        tools = {} if text is None else _parse(path, text).get("tool")
    except ValueError as error:
        why, _, _ = str(error).partition("; ")
        unread = f"{why}, so no [tool.insitu] in it sets anything; mend it there, or write {FILE} beside it"
        return SettingsFile(unread=unread if _may_be_ours(path) else "")
    table = tools.get("insitu") if isinstance(tools, dict) else None
    if table is None:
        return SettingsFile()
    if not isinstance(table, dict):
        raise ValueError(f"{path}: tool.insitu is no table; write [tool.insitu] above its settings")
    return SettingsFile(path, table)


def _may_be_ours(path: Path) -> bool:
    try:
        text = _bytes(path).replace(b"\0", b"").decode("utf-8", errors="replace")  # UTF-16 too, as far as it is ASCII
    except OSError:
        return True
    return _OURS.search(text.lstrip("\ufeff\ufffd")) is not None


def _bytes(path: Path) -> bytes:
    if path.is_fifo():  # a read would wait for who writes
        raise OSError(errno.EINVAL, "is a pipe", str(path))
    return path.read_bytes()


def _text(path: Path) -> str | None:
    """Return what a file holds, None where there is none. Raises ValueError where it cannot be read."""
    try:
        return _bytes(path).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is no UTF-8 (at line {line}); write it anew, or take it away") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"{path} cannot be read: {reason}; see that it is a file, and yours") from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}; mend it there, or take the file away") from None
