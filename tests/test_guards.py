"""Each test that CONTRIBUTING.md names as the guard of a failure is there under that name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
GUARD = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def guards(page: str) -> list[tuple[str, str]]:
    return [(found[1], found[2]) for found in GUARD.finditer(page)]


def missing(named: list[tuple[str, str]]) -> list[str]:
    """Return the tests that are not there."""
    there: dict[str, set[str]] = {}
    for file, _ in named:
        path = TESTS / file
        tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
        there[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return [f"{file}::{name}" for file, name in named if name not in there[file]]


def test_every_guard_exists() -> None:
    page = (TESTS.parent / "CONTRIBUTING.md").read_text()
    assert len(guards(page)) >= 50
    assert missing(guards(page)) == []


def test_a_guard_that_is_gone_is_seen() -> None:
    page = "`test_guards.py::test_every_guard_exists`, `test_guards.py::test_gone`, `gone.py::test_it`"
    assert missing(guards(page)) == ["test_guards.py::test_gone", "gone.py::test_it"]
