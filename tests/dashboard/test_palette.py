"""Every class has one name and one letter, on the canvas, in tables and in the terminal."""

from __future__ import annotations

import re

import pytest

from insitu.vocabulary import LedgerClass
from insitu_collector.stalls import LETTERS
from insitu_dashboard.components import WEB
from insitu_dashboard.palette import LABELS

LINE = re.compile(r'^  (\w+): \{ letter: "(.)", label: "([^"]+)", colour: "(#[0-9A-F]{6})"', re.MULTILINE)


def test_canvas_tables_and_terminal_name_classes_alike() -> None:
    drawn = {name: (letter, label) for name, letter, label, _ in LINE.findall((WEB / "draw.js").read_text())}
    assert drawn == {str(cls): (LETTERS[cls], LABELS[cls]) for cls in LedgerClass}


@pytest.mark.parametrize("cls", list(LedgerClass))
def test_every_class_has_a_label(cls: LedgerClass) -> None:
    assert LABELS[cls].strip() == LABELS[cls] != ""
