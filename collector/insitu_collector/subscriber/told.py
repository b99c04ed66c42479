"""Up to which step first stages said whom their steps served. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from insitu.identity import Source
from insitu.vocabulary import Role

MAX_REPLICAS: Final = 8192
MAX_WRITERS: Final = 1024
"""Of a replica, with those that ended; the ones known longest are forgotten."""


@dataclass(slots=True)
class _Writer:
    """What one process of a first stage said."""

    rank: int
    newest: int = -1
    """Number of a step; -1: it said nothing so far."""
    unix_ns: int = 0
    """When the last step began."""
    has_maps: bool = False


class Told:
    """Of all replicas of a store.

    Every rank of a first stage may write row maps, or some of them, or none: who writes none says nothing of steps of
    those who do. Whoever ended before a process began says nothing of its steps, which may begin anew.
    """

    def __init__(self) -> None:
        self._writers: dict[tuple[str, int], dict[int, _Writer]] = {}
        """By run and replica, then by epoch."""

    def expect(self, source: Source) -> None:
        """A process is known by name. One of a first stage will say whom its steps served."""
        if source.role != Role.RANK or source.stage != 0:
            return
        of = self._of(source)
        for epoch in [epoch for epoch, each in of.items() if each.rank == source.rank and each.newest < 0]:
            del of[epoch]  # ended before its first step
        self._writer(source)

    def learn(self, source: Source, newest: int, unix_ns: int, *, has_maps: bool) -> None:
        """A process said whom steps served up to `newest`; the last began at that Unix time."""
        writer = self._writer(source)
        writer.newest, writer.unix_ns = max(writer.newest, newest), max(writer.unix_ns, unix_ns)
        writer.has_maps |= has_maps

    def up_to(self, source: Source) -> int:
        """Return up to which step it came whom steps of a process served; -1: of none.

        Where nobody of the replica writes row maps, steps without one count, once all of its first stage said some.
        """
        of = self._writers.get((source.run, source.replica), {}).values()
        spoke = [each for each in of if each.newest >= 0 and each.unix_ns >= source.unix_anchor_ns]
        with_maps = [each for each in spoke if each.has_maps]
        if not with_maps and any(each.newest < 0 for each in of):
            return -1
        return max((each.newest for each in with_maps or spoke), default=-1)

    def _of(self, source: Source) -> dict[int, _Writer]:
        of = self._writers.setdefault((source.run, source.replica), {})
        while len(self._writers) > MAX_REPLICAS:
            del self._writers[next(iter(self._writers))]
        return of

    def _writer(self, source: Source) -> _Writer:
        of = self._of(source)
        writer = of.setdefault(source.epoch, _Writer(source.rank))
        while len(of) > MAX_WRITERS:
            del of[next(iter(of))]
        return writer
