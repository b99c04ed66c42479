"""Messages that seem to have arrived before they were sent: what they say of the hosts' clocks. Pure.

As the controlled logical clock of D. Becker et al., "Scalable Timestamp Synchronization for Event Traces" does, but for
telling only: no time is ever shifted by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from insitu.vocabulary import IntervalClass
from insitu_collector.tape import Columns

_SENDS: Final = (IntervalClass.SEND_XFER, IntervalClass.SEND_WAIT)
_RECEIVES: Final = (IntervalClass.RECV_XFER, IntervalClass.RECV_WAIT)


@dataclass(frozen=True, slots=True)
class Violations:
    """Of one pair of ranks."""

    source: int
    target: int
    num_messages: int
    num_early: int
    """Messages whose receive ended before their send began."""
    most_ns: int
    """The earliest of them was so early: at least so far are the clocks apart."""


def violations(
    intervals: Columns, stages: Mapping[int, int], slack_ns: Mapping[tuple[int, int], int] | None = None
) -> list[Violations]:
    """Return what the messages from stage to stage say, for each pair of ranks that exchanged some.

    intervals: columns of `insitu_collector.evidence.Evidence.intervals`. stages: rank -> stage. A message is a step
    that one rank sent to a later stage (its earliest send interval with that peer) and the other received from it (its
    latest receive interval). Sampled ids that go back are none: who waits for them names the step they make possible.
    slack_ns: pair -> by how much its clocks may be off; a message is early only beyond that.
    """
    send = _ends(intervals, _SENDS, "t0", earliest=True)
    receive = _ends(intervals, _RECEIVES, "t", earliest=False)
    found: dict[tuple[int, int], list[int]] = {}
    for (source, target, step), sent_ns in send.items():
        got_ns = receive.get((target, source, step))
        if got_ns is not None and stages.get(source, 0) < stages.get(target, 0):
            found.setdefault((source, target), []).append(sent_ns - got_ns)
    return [_of_pair(pair, early, (slack_ns or {}).get(pair, 0)) for pair, early in sorted(found.items())]


def _of_pair(pair: tuple[int, int], early: list[int], slack_ns: int) -> Violations:
    beyond = [ns for ns in early if ns > slack_ns]
    return Violations(*pair, len(early), len(beyond), max(beyond, default=0))


def _ends(
    rows: Columns, classes: tuple[IntervalClass, ...], column: str, *, earliest: bool
) -> dict[tuple[int, int, int], int]:
    """Return (rank, peer, step) -> the first begin or the last end of its intervals of these classes."""
    wanted = np.isin(rows["cls"], classes) & (rows["peer"] >= 0) & (rows["step"] >= 0)
    order = np.argsort(rows[column][wanted], kind="stable")
    order = order[::-1] if earliest else order  # the last one written stays
    columns = (rows[name][wanted][order].tolist() for name in ("rank", "peer", "step", column))
    return {(rank, peer, step): t_ns for rank, peer, step, t_ns in zip(*columns, strict=True)}
