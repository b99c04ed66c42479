"""How ledger classes are called and look, on pages, in charts and in the terminal: their one home.

`dashboard/insitu_dashboard/web/draw.js` holds the same for the browser; a test compares them. Six hues, checked for
colour-blind eyes; classes that share one are told apart by letter and hatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from insitu.vocabulary import LedgerClass


@dataclass(frozen=True, slots=True)
class Look:
    """One class: a letter that stands for it, its name in words, its colour, and what a letter on that colour needs."""

    letter: str
    label: str
    colour: str
    ink: str
    """Of a letter on the colour."""


_BLACK: Final = "#000000"
_WHITE: Final = "#FFFFFF"

LOOKS: Final[dict[LedgerClass, Look]] = {
    LedgerClass.COMPUTE: Look("C", "compute", "#0072B2", _WHITE),
    LedgerClass.HOST: Look("H", "host", "#CC79A7", _BLACK),
    LedgerClass.GC: Look("G", "gc", "#CC79A7", _BLACK),
    LedgerClass.COMPILE: Look("K", "compile", "#CC79A7", _BLACK),
    LedgerClass.COLLECTIVE: Look("L", "collective", "#CC79A7", _BLACK),
    LedgerClass.WAIT_UPSTREAM: Look("U", "waits upstream", "#E69F00", _BLACK),
    LedgerClass.WAIT_DOWNSTREAM: Look("D", "waits downstream", "#9C2F00", _WHITE),
    LedgerClass.TRANSFER: Look("T", "transfer", "#56B4E9", _BLACK),
    LedgerClass.NO_DEMAND: Look("-", "no demand", "#DDDDDD", _BLACK),
    LedgerClass.CONTENDED: Look("X", "contended", "#6B6B6B", _WHITE),
    LedgerClass.UNRECORDED: Look("?", "unrecorded", "#6B6B6B", _WHITE),
    LedgerClass.OTHER: Look("o", "other", "#6B6B6B", _WHITE),
}
LABELS: Final[dict[LedgerClass, str]] = {cls: look.label for cls, look in LOOKS.items()}
LETTERS: Final[dict[LedgerClass, str]] = {cls: look.letter for cls, look in LOOKS.items()}
