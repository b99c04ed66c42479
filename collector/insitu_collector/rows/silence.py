"""Which sites were said not to fire, from rows of `events`. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.sites.never_fired import FIRED, NEVER_FIRED, SEPARATOR
from insitu_collector.clocks.timeline import Timeline

_KINDS: Final = pa.array([NEVER_FIRED, FIRED])


@dataclass
class Silence:
    """The silent sites of one session."""

    rank: int
    stage: int
    t_ns: int = 0
    """When it was last said, on the evidence's timeline."""
    names: dict[str, None] = field(default_factory=dict)
    """In order of execution."""


def take(silences: dict[int, Silence], events: pa.Table, timeline: Timeline) -> None:
    """Bring epoch -> silence up to date with new rows of `events`, in the order they were written."""
    rows = events.filter(pc.is_in(events["kind"], _KINDS))
    times = timeline.moved(rows, "t_ns").tolist()
    told = zip(rows.select(["epoch", "rank", "stage", "row_seq", "kind", "text"]).to_pylist(), times, strict=True)
    for row, t_ns in sorted(told, key=lambda pair: pair[0]["row_seq"]):
        silence = silences.setdefault(row["epoch"], Silence(row["rank"], row["stage"]))
        names = (row["text"] or "").split(SEPARATOR)
        if row["kind"] == NEVER_FIRED:
            silence.t_ns = t_ns
            silence.names.update(dict.fromkeys(names))
        else:
            for name in names:
                silence.names.pop(name, None)
