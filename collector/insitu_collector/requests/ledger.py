"""The request ledger: where each request's time went, exactly one class for each nanosecond of its life. Pure.

Rules: docs/verdicts.md, "The request ledger". What the record does not say, or says twice, is `other`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import RequestClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.requests.cover import cover
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.work import LEDGER_CLASSES

Bool = NDArray[np.bool_]

CLASSES: Final = tuple(RequestClass)
PLACE: Final = {cls: place for place, cls in enumerate(CLASSES)}
NOBODY: Final = -2
"""`rank` and `doing` of a span that waits for no rank (-1 is the driver)."""
SPAN: Final = ("at", "begin", "end", "cls", "rank", "doing")


@dataclass(frozen=True, slots=True)
class RequestLedger:
    """Requests by their begin. A request's spans are disjoint and cover its life, or its part of the window."""

    names: tuple[str, ...]
    begin_ns: Int64
    end_ns: Int64
    first_token_ns: Int64
    """-1 where it is not known."""
    arrived: Bool
    """False: its arrival is not on record, and its life begins with the first thing that is."""
    ended: Bool
    """False: its end is not on record, and it is followed to the end of what is."""
    spans: Columns
    """By (`at`, `begin`): the request's place, `begin`, `end`, `cls` (a place in `CLASSES`); for a `pipeline_wait`
    the `rank` waited for, and `doing`: in which ledger class it was (a place in `LEDGER_CLASSES`)."""
    unsplit_ns: int
    """Decoding beside the prompts of others that could not be split: no decode-only step of that size was near."""

    def __len__(self) -> int:
        return len(self.names)

    def sums(self, wanted: Bool | None = None) -> Int64:
        """Return nanoseconds, int64[num_requests, len(CLASSES)], of all spans or of some."""
        found = np.zeros((len(self.names), len(CLASSES)), np.int64)
        spans = self.spans if wanted is None else {name: column[wanted] for name, column in self.spans.items()}
        np.add.at(found, (spans["at"], spans["cls"]), spans["end"] - spans["begin"])
        return found

    def is_of(self, *classes: RequestClass) -> Bool:
        """Tell which spans are of some classes."""
        found: Bool = np.isin(self.spans["cls"], [PLACE[cls] for cls in classes])
        return found

    def waits(self, at: int | None = None) -> dict[tuple[int, str], int]:
        """Return (rank, its ledger class) -> nanoseconds of `pipeline_wait`, of one request or all, longest first."""
        mine = self.is_of(RequestClass.PIPELINE_WAIT)
        if at is not None:
            mine &= self.spans["at"] == at
        keys, place = np.unique(
            np.stack([self.spans["rank"][mine], self.spans["doing"][mine]]), axis=1, return_inverse=True
        )
        ns = np.zeros(keys.shape[1], np.int64)
        np.add.at(ns, place.reshape(-1), (self.spans["end"] - self.spans["begin"])[mine])
        order = np.argsort(-ns, kind="stable")
        return {(int(keys[0, n]), str(LEDGER_CLASSES[keys[1, n]])): int(ns[n]) for n in order}


def exclusive(claims: Columns, begin: Int64, end: Int64) -> Columns:
    """Return the spans of n lives [begin, end): where just one claim holds its class, elsewhere `other`.

    claims: the columns of `SPAN`, in any order, overlapping or not.
    """
    num = len(begin)
    at = np.concatenate([np.arange(num), claims["at"]])
    found = cover(
        at,
        np.concatenate([begin, np.maximum(claims["begin"], begin[claims["at"]])]),
        np.concatenate([end, np.minimum(claims["end"], end[claims["at"]])]),
    )
    single = found.depth == 2  # the life itself, and one claim
    which = (found.total - found.key - num)[single]
    spans = {"at": found.key, "begin": found.begin, "end": found.end}
    for name, missing in (("cls", PLACE[RequestClass.OTHER]), ("rank", NOBODY), ("doing", NOBODY)):
        spans[name] = np.full(len(found.key), missing)
        spans[name][single] = claims[name][which]
    return spans
