"""What ledger classes are called on pages; `web/draw.js` says how they look."""

from __future__ import annotations

from typing import Final

from insitu.vocabulary import LedgerClass

LABELS: Final[dict[LedgerClass, str]] = {
    LedgerClass.COMPUTE: "compute",
    LedgerClass.HOST: "host",
    LedgerClass.GC: "gc",
    LedgerClass.COMPILE: "compile",
    LedgerClass.COLLECTIVE: "collective",
    LedgerClass.WAIT_UPSTREAM: "waits upstream",
    LedgerClass.WAIT_DOWNSTREAM: "waits downstream",
    LedgerClass.TRANSFER: "transfer",
    LedgerClass.NO_DEMAND: "no demand",
    LedgerClass.CONTENDED: "contended",
    LedgerClass.UNRECORDED: "unrecorded",
    LedgerClass.OTHER: "other",
}
