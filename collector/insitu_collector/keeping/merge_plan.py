"""Which small segments are merged: pure arithmetic over sizes and times."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from insitu.segments.layout import SegmentName
from insitu.segments.retention import Held


@dataclass(frozen=True, slots=True)
class MergeRules:
    """When merging is worth it."""

    target_bytes: int = 128 << 20
    """Size of a merged segment, at most. What is larger than half of it is left alone."""
    min_inputs: int = 8
    max_span_s: float = 3600.0
    """Between the oldest and the youngest: rows stay as long as the youngest that they are merged with."""


IN_BACKGROUND: Final = MergeRules()
ON_DEMAND: Final = MergeRules(min_inputs=2)


def merges(held: Iterable[Held], rules: MergeRules, left_alone: Collection[SegmentName] = ()) -> list[list[Held]]:
    """Return which sealed segments of one shard become one, each list in order of age, of one table.

    Neighbours in time only. No input is larger than all the others together: whenever a row is copied, its segment at
    least doubles, so that a row is copied a few times in its life however many segments come.
    """
    tables: dict[str, list[Held]] = {}
    for segment in sorted(held, key=lambda s: (s.unix_ns, s.name.number)):
        tables.setdefault(segment.name.table, []).append(segment)
    return [
        worth
        for table in sorted(tables)
        for group in _groups(tables[table], rules, left_alone)
        if (worth := _worth(group, rules))
    ]


def _groups(ordered: Sequence[Held], rules: MergeRules, left_alone: Collection[SegmentName]) -> Iterator[list[Held]]:
    group: list[Held] = []
    for segment in ordered:
        if segment.num_bytes > rules.target_bytes // 2 or segment.name in left_alone:
            yield group
            group = []
            continue
        is_full = sum(s.num_bytes for s in group) + segment.num_bytes > rules.target_bytes
        if group and (is_full or segment.unix_ns - group[0].unix_ns > rules.max_span_s * 1e9):
            yield group
            group = []
        group.append(segment)
    yield group


def _worth(group: list[Held], rules: MergeRules) -> list[Held]:
    """Return the youngest part of a group that is worth a merge, or nothing."""
    while len(group) >= max(rules.min_inputs, 2):
        largest = max(range(len(group)), key=lambda i: group[i].num_bytes)
        if 2 * group[largest].num_bytes <= sum(s.num_bytes for s in group):
            return group
        group = group[largest + 1 :]
    return []
