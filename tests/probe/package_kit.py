"""Installs packages for a test, as pip leaves them: a module, and metadata with entry points."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

VERSION = "1.0"


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    entries: Mapping[str, Mapping[str, str]],
    code: str = "",
) -> None:
    """Write a package of one module, and put its folder on the path. entries: group -> name -> `module:attribute`."""
    home = folder / package
    metadata = home / f"{package}-{VERSION}.dist-info"
    metadata.mkdir(parents=True)
    (home / f"{package}.py").write_text(textwrap.dedent(code))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSION}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in found.items()) for group, found in entries.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(home))
