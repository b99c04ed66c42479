"""Every row of the failure matrix has a test: one that CONTRIBUTING.md names, or one with the row's number in its name.

That what is named there exists is for test_guards.py.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = frozenset(range(1, 32))
PENDING: frozenset[int] = frozenset()
"""Rows without any test yet. Take out those that have one."""
LINE = re.compile(r"^\| (\d+) \| .* \| (.*) \|$", re.MULTILINE)
NUMBERED = re.compile(r"test_row_(\d\d)_\w+")


def lines_of(page: str) -> dict[int, str]:
    """Return what the table says of the tests of each row."""
    return {int(found[1]): found[2] for found in LINE.finditer(page)}


@cache
def numbered() -> frozenset[int]:
    """Return the rows that are in the name of a test."""
    names = (
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    )
    return frozenset(int(found[1]) for name in names if (found := NUMBERED.fullmatch(name)))


def test_every_row_has_a_test() -> None:
    lines = lines_of((TESTS.parent / "CONTRIBUTING.md").read_text())
    assert set(lines) == ROWS, "a line a row"
    named = {row for row, tests in lines.items() if "::test_" in tests}
    assert ROWS - named - numbered() == PENDING


def test_a_number_in_a_line_is_that_of_the_line() -> None:
    for row, tests in lines_of((TESTS.parent / "CONTRIBUTING.md").read_text()).items():
        assert {int(number) for number in re.findall(r"row_(\d\d)", tests)} <= {row}


def test_a_row_without_a_test_is_seen() -> None:
    page = "| 1 | a fault | `a/test_b.py::test_c` |\n| 2 | another | `row_02` |\n"
    assert lines_of(page) == {1: "`a/test_b.py::test_c`", 2: "`row_02`"}
    assert {1, 28, 30} <= numbered()
    assert 99 not in numbered()
