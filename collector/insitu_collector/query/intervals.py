"""Intervals with their ledger class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu_collector.clocks.timeline import Timeline
from insitu_collector.ledger.window import rank_stages
from insitu_collector.query.asked import EVERY_RUN, Asked, BadQuestion
from insitu_collector.query.rows import named_schema
from insitu_collector.query.tensors import Answers
from insitu_collector.views.spans import CLASSES, ledger_classes

LEDGER_CLASS: Final = "ledger_class"
_PLACES: Final = ("replica", "rank", "stage")


def with_classes(rows: Answers, asked: Asked) -> pa.Table:
    """Return the intervals that are meant, each with its ledger class unless other columns are asked for.

    Whether a wait was for want of work is known by the first stage: so all of a window is read, of whatever rank it
    is, and those that are meant are taken of it. Raises BadQuestion, NothingFound.
    """
    columns = None if asked.columns is None else list(dict.fromkeys(asked.columns))
    if columns is not None and LEDGER_CLASS not in columns:
        return rows.table("intervals", asked)
    if asked.run == EVERY_RUN:
        raise BadQuestion('a ledger is of one run; with run="*" ask for columns without ledger_class')
    everyone = replace(asked, columns=None, replica=None, rank=None, stage=None)
    found = _classified(rows, everyone)
    for name in _PLACES:
        if getattr(asked, name) is not None:
            found = found.filter(pc.equal(found[name], getattr(asked, name)))
    return found if columns is None else _selected(found, columns)


def _classified(rows: Answers, asked: Asked) -> pa.Table:
    run = rows.directory.chosen_run(asked.run)
    clock: Timeline = rows.directory.clock(run)
    found = rows.table("intervals", replace(asked, run=run))
    names = np.array([str(cls) for cls in CLASSES])
    classes = ledger_classes(found, clock, rank_stages(rows.directory.sources(run), found))
    return found.append_column(LEDGER_CLASS, pa.array(names[classes] if len(classes) else [], pa.utf8()))


def _selected(found: pa.Table, columns: Sequence[str]) -> pa.Table:
    unknown = [name for name in columns if name not in found.column_names]
    if unknown:
        known = ", ".join((*named_schema("intervals").names, LEDGER_CLASS))
        raise BadQuestion(f"no column {unknown[0]!r}; those of intervals are {known}")
    return found.select(columns)
