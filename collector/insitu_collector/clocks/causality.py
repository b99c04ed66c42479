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
from insitu_collector.clocks.timeline import Int64
from insitu_collector.rows.tape import Columns

MIN_MESSAGES: Final = 20
EARLY_SHARE: Final = 0.01
"""Share of the messages between two ranks that must seem to arrive before they were sent; single ones may be rows of a
step that began again."""
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

    @property
    def contradicts(self) -> bool:
        """Tell whether they are too many to be rows of steps that began again."""
        return self.num_messages >= MIN_MESSAGES and self.num_early >= EARLY_SHARE * self.num_messages


def violations(
    intervals: Columns, stages: Mapping[int, int], slack_ns: Mapping[tuple[int, int], int] | None = None
) -> list[Violations]:
    """Return what the messages from stage to stage say, for each pair of ranks that exchanged some.

    intervals: columns of `insitu_collector.evidence.Evidence.intervals`. stages: rank -> stage. A message is a step
    that one rank sent to a later stage (its earliest send interval with that peer) and the other received from it (its
    latest receive interval). Sampled ids that go back are none: who waits for them names the step they make possible.
    slack_ns: pair -> by how much its clocks may be off; a message is early only beyond that.
    """
    send = _first(intervals, _SENDS, ("rank", "peer", "step"), "t0")
    receive = _first(intervals, _RECEIVES, ("peer", "rank", "step"), "t", latest=True)
    both = np.concatenate([send, receive], axis=1)
    both = both[:, np.lexsort(both[2::-1])]  # by message; a send comes before its receive, as lexsort keeps their order
    met = np.flatnonzero((both[:3, 1:] == both[:3, :-1]).all(axis=0))
    source, target, _, sent_ns = both[:, met]
    ahead = np.array([stages.get(int(a), 0) < stages.get(int(b), 0) for a, b in zip(source, target, strict=True)], bool)
    early = sent_ns - both[3, met + 1]
    pairs = sorted(set(zip(source[ahead].tolist(), target[ahead].tolist(), strict=True)))
    return [
        _of_pair(pair, early[(source == pair[0]) & (target == pair[1])], (slack_ns or {}).get(pair, 0))
        for pair in pairs
    ]


def _of_pair(pair: tuple[int, int], early: Int64, slack_ns: int) -> Violations:
    beyond = early[early > slack_ns]
    return Violations(*pair, len(early), len(beyond), int(beyond.max(initial=0)))


def _first(
    rows: Columns, classes: tuple[IntervalClass, ...], key: tuple[str, str, str], column: str, *, latest: bool = False
) -> Int64:
    """Return int64[4, num_messages]: the key of each message (source, target, step) and the first begin or the last
    end of its intervals of these classes."""
    wanted = np.isin(rows["cls"], classes) & (rows["peer"] >= 0) & (rows["step"] >= 0)
    found = np.stack([rows[name][wanted] for name in (*key, column)])
    order = np.lexsort((-found[3] if latest else found[3], *found[2::-1]))
    found = found[:, order]
    return np.asarray(found[:, np.append(True, (np.diff(found[:3]) != 0).any(axis=0))[: found.shape[1]]], np.int64)


def shown_ns(
    intervals: Columns, stages: Mapping[int, int], hosts: Mapping[int, str], slack_ns: Mapping[tuple[int, int], int]
) -> dict[frozenset[str], int]:
    """Return two hosts -> how far apart messages between their ranks show the clocks to be. hosts: rank -> boot id."""
    found: dict[frozenset[str], int] = {}
    for pair in violations(intervals, stages, slack_ns):
        between = frozenset((hosts.get(pair.source, ""), hosts.get(pair.target, "")))
        if pair.contradicts and len(between) == 2:
            found[between] = max(pair.most_ns, found.get(between, 0))
    return found
