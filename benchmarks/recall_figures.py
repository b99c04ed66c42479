"""What the outcomes of `verdict_recall.py` come to: precision, recall above the limit and by size, as a table.

Pure, but for the files of outcomes: one JSON object a line, so that a round can be made in parts and read as one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from recall_cases import KINDS

BAR: Final = 0.98
"""Precision, and recall above the detection limit."""
NUM_BUCKETS: Final = 6
"""Of sizes, in the table and the plot."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    kind: str
    seed: int
    size: float
    limit: float | None
    """The size from which on it must be found; None: the verdict promised nothing here."""
    found: bool
    false: tuple[str, ...]
    """Alarms on the run with the fault that were not expected, by kind and rank."""
    false_when_healthy: tuple[str, ...]
    healthy: bool
    """The twin ended as `healthy`, and nothing else stood."""

    @property
    def above(self) -> bool:
        return self.limit is not None and self.size >= self.limit

    @property
    def is_odd(self) -> bool:
        """Something was said that is not so, or not said although it was promised."""
        return bool(self.false or self.false_when_healthy or (self.above and not self.found))


def written(outcome: Outcome) -> str:
    """Return an outcome as its line of a file."""
    return json.dumps(asdict(outcome))


def read(paths: Iterable[Path]) -> list[Outcome]:
    """Return the outcomes of files, by kind and seed; what stands in several counts once."""
    found: dict[tuple[int, int], Outcome] = {}
    order = {name: place for place, name in enumerate(KINDS)}
    for line in (line for path in paths for line in path.read_text().splitlines()):
        fields = json.loads(line)
        fields |= {name: tuple(fields[name]) for name in ("false", "false_when_healthy")}
        found[order[fields["kind"]], fields["seed"]] = Outcome(**fields)
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class Figures:
    """What all cases say of one kind."""

    kind: str
    num_cases: int
    num_found: int
    num_false: int
    """False alarms of its verdict, on the cases of all kinds and on their healthy twins."""
    num_above: int
    num_found_above: int
    num_healthy: int
    """Twins that ended as `healthy` alone."""

    @property
    def precision(self) -> float:
        return self.num_found / max(1, self.num_found + self.num_false)

    @property
    def recall_above(self) -> float | None:
        return self.num_found_above / self.num_above if self.num_above else None

    @property
    def is_met(self) -> bool:
        return self.precision >= BAR and self.recall_above is not None and self.recall_above >= BAR


def figures(outcomes: Sequence[Outcome]) -> list[Figures]:
    """Return the figures of each kind that was tried."""
    false = Counter(
        alarm.partition(" ")[0] for outcome in outcomes for alarm in (*outcome.false, *outcome.false_when_healthy)
    )
    found = []
    for name in dict.fromkeys(outcome.kind for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.kind == name]
        above = [outcome for outcome in mine if outcome.above]
        hits, healthy = sum(o.found for o in mine), sum(o.healthy for o in mine)
        num_false = false[str(KINDS[name].verdict)]
        found.append(Figures(name, len(mine), hits, num_false, len(above), sum(o.found for o in above), healthy))
    return found


def by_size(outcomes: Sequence[Outcome], name: str) -> Iterator[tuple[float, float, int, float]]:
    """Yield (from, to, cases, recall) of each bucket of sizes that has cases; the outer two hold all beyond as well."""
    mine = [outcome for outcome in outcomes if outcome.kind == name]
    low, high = KINDS[name].sizes
    edges = np.geomspace(low, high, NUM_BUCKETS + 1) if high > low else np.array([low, high])
    place = np.clip(np.searchsorted(edges, [o.size for o in mine], side="right") - 1, 0, len(edges) - 2)
    for bucket, (begin, end) in enumerate(pairwise(edges)):
        inside = [o for o, at in zip(mine, place, strict=True) if at == bucket]
        if inside:
            yield float(begin), float(end), len(inside), sum(o.found for o in inside) / len(inside)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return precision and recall of each kind, and recall by size, as Markdown."""
    lines = [
        "| kind | cases with, without | found | false alarms | precision | recall above the limit | `healthy` alone |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for each in figures(outcomes):
        recall = "-" if each.recall_above is None else f"{each.recall_above:.3f} of {each.num_above}"
        counts = f"{each.num_cases}, {each.num_cases} | {each.num_found} | {each.num_false}"
        lines.append(f"| `{each.kind}` | {counts} | {each.precision:.3f} | {recall} | {each.num_healthy} |")
    lines += ["", "| kind | size | recall by size |", "|---|---|---|"]
    for name in dict.fromkeys(outcome.kind for outcome in outcomes):
        parts = [f"{begin:.3g}-{end:.3g}: {recall:.2f} of {n}" for begin, end, n, recall in by_size(outcomes, name)]
        lines.append(f"| `{name}` | {KINDS[name].unit} | {'; '.join(parts)} |")
    return "\n".join(lines)
