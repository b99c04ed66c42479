"""Heartbeats: one `health` row each, as verdicts read it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from insitu.vocabulary import NO_RANK
from insitu_collector.clocks.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Beat:
    """One `health` row. Counters are cumulative; `open_*` is what the step thread was in the middle of."""

    t_ns: int
    own_ns: int
    """The same by the process's own clock."""
    seq: int
    """Its `row_seq`: one more than that of the heartbeat before, so that lost ones show."""
    epoch: int
    rank: int
    stage: int
    boot_id: str
    cpu_ns: int
    run_delay_ns: int
    host_busy_ns: int | None
    host_cores: int
    open_cls: int | None
    open_since_ns: int
    open_step_id: int
    open_peer: int
    num_steps: int | None
    dropped: Mapping[tuple[str, str], int]
    closing: bool


def beat_of(row: dict[str, Any], boot_id: str, t_ns: int) -> Beat:
    """Return a row of `health` as a heartbeat of a host. t_ns: its time on the timeline; how long the interval has been
    open is what the process's own clock says."""
    return Beat(
        t_ns=t_ns,
        own_ns=row["t_ns"],
        seq=row["row_seq"],
        epoch=row["epoch"],
        rank=row["rank"],
        stage=row["stage"],
        boot_id=boot_id,
        cpu_ns=row["cpu_ns"] or 0,
        run_delay_ns=row["run_delay_ns"] or 0,
        host_busy_ns=row["host_busy_ns"],
        host_cores=row["host_cores"] or 1,
        open_cls=row["open_cls"],
        open_since_ns=t_ns if row["open_since_ns"] is None else t_ns - (row["t_ns"] - row["open_since_ns"]),
        open_step_id=-1 if row["open_step_id"] is None else row["open_step_id"],
        open_peer=NO_RANK if row["open_peer"] is None else row["open_peer"],
        num_steps=row["num_steps"],
        dropped={(drop["table"], drop["reason"]): drop["rows"] for drop in row["dropped"] or ()},
        closing=bool(row["closing"]),
    )


def last_beats(held: Mapping[int, Sequence[Beat]]) -> dict[int, Beat]:
    """Return rank -> its latest heartbeat; held: epoch -> heartbeats, oldest first."""
    found: dict[int, Beat] = {}
    for beats in held.values():
        beat = beats[-1]
        if beat.rank != NO_RANK and (beat.rank not in found or beat.t_ns > found[beat.rank].t_ns):
            found[beat.rank] = beat
    return found


def moved(held: dict[int, deque[Beat]], clock: Timeline) -> None:
    """Put heartbeats on another timeline."""
    for epoch, beats in held.items():
        own_ns = np.array([beat.own_ns for beat in beats], np.int64)
        t_ns = clock.times(own_ns, np.full(len(beats), epoch, np.uint64)).tolist()
        held[epoch] = deque(_at(beat, at_ns) for beat, at_ns in zip(beats, t_ns, strict=True))


def _at(beat: Beat, t_ns: int) -> Beat:
    if t_ns == beat.t_ns:
        return beat
    return replace(beat, t_ns=t_ns, open_since_ns=beat.open_since_ns + t_ns - beat.t_ns)
