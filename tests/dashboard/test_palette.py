"""Every class has one name, letter and colour, on the canvas, in tables, in charts and in the terminal."""

from __future__ import annotations

import re

import pytest

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger.palette import LABELS, LOOKS, Look
from insitu_dashboard.components import WEB

LINE = re.compile(
    r'^  (\w+): \{ letter: "(.)", label: "([^"]+)", colour: "(#[0-9A-F]{6})".* ink: "(#[0-9A-F]{6})"', re.MULTILINE
)


def test_canvas_tables_and_terminal_name_classes_alike() -> None:
    drawn = {name: Look(*look) for name, *look in LINE.findall((WEB / "draw.js").read_text())}
    assert drawn == {str(cls): LOOKS[cls] for cls in LedgerClass}
    assert len({look.letter for look in LOOKS.values()}) == len(LOOKS)


@pytest.mark.parametrize("cls", list(LedgerClass))
def test_every_class_has_a_label(cls: LedgerClass) -> None:
    assert LABELS[cls].strip() == LABELS[cls] != ""
