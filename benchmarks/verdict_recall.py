"""How often the judge is right on simulated runs whose fault is known: precision, and recall by size of the fault.

`python benchmarks/verdict_recall.py --seeds 200`; exits 1 when a kind is under the bar.

Each case is a run of `insitu_collector.simulate` with random times, arrivals, noise and a fault drawn by its seed, and
the same run without the fault, both fed to the judgement a second at a time. Right: the verdict expected, on the rank
expected. False: any other alarm, on any run, or one that was withdrawn. Missed: the verdict was not said.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from recall_cases import KINDS, Case, draw

from insitu.vocabulary import VerdictKind
from insitu_collector.judgement import Judgement
from insitu_collector.simulate import Scenario, simulate
from insitu_collector.slices import seconds
from insitu_collector.verdicts import Verdict, standing

BAR: Final = 0.98
"""Precision, and recall above the detection limit."""
NUM_BUCKETS: Final = 6
"""Of sizes, in the table and the plot."""
NUM_PROCESSES: Final = 2
QUIET: Final = frozenset((VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE, VerdictKind.HOST_CONTENDED))


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    kind: str
    seed: int
    size: float
    above: bool
    """Larger than the detection limit."""
    found: bool
    false: tuple[str, ...]
    """Alarms on the run with the fault that were not expected, by kind and rank."""
    false_when_healthy: tuple[str, ...]


def judge(scenario: Scenario) -> list[Verdict]:
    """Return every revision the judgement of a simulated run writes."""
    judgement = Judgement()
    told: list[Verdict] = []
    for part in seconds(simulate(scenario)):
        told += judgement.look(part)
    return told + judgement.look({}, final=True)


def alarms(told: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts that say something is wrong: those that stand, and those that were withdrawn."""
    withdrawn = [verdict for verdict in told if verdict.state == "revised"]
    return [verdict for verdict in [*standing(list(told)), *withdrawn] if verdict.kind not in QUIET]


def tried(name: str, seed: int) -> Outcome:
    """Judge one case and its healthy twin."""
    case = draw(name, seed)
    told, twin = judge(case.scenario), judge(case.healthy)
    said = alarms(told)
    found = all(any(is_expected(verdict, case, one) for verdict in said) for one in range(len(case.expected)))
    false = [v for v in said if not any(is_expected(v, case, one) for one in range(len(case.expected)))]
    above = case.size >= KINDS[name].limit(case, twin)
    return Outcome(name, seed, case.size, above, found, named(false), named(alarms(twin)))


def is_expected(verdict: Verdict, case: Case, one: int) -> bool:
    """Tell whether a verdict is one of those that should stand, at the place where it should."""
    kind, rank = case.expected[one]
    at_layer = case.layer is None or verdict.layer == case.layer
    return verdict.kind is kind and rank in (None, verdict.on_rank) and at_layer and verdict.state != "revised"


def named(told: Iterable[Verdict]) -> tuple[str, ...]:
    return tuple(f"{verdict.kind} on rank {verdict.on_rank}" for verdict in told)


@dataclass(frozen=True)
class Figures:
    """What all cases say of one kind."""

    kind: str
    num_cases: int
    num_found: int
    num_false: int
    """False alarms of this kind, on the cases of all kinds and on their healthy twins."""
    num_above: int
    num_found_above: int

    @property
    def precision(self) -> float:
        return self.num_found / max(1, self.num_found + self.num_false)

    @property
    def recall_above(self) -> float | None:
        return self.num_found_above / self.num_above if self.num_above else None

    @property
    def is_met(self) -> bool:
        return self.precision >= BAR and (self.recall_above is None or self.recall_above >= BAR)


def figures(outcomes: Sequence[Outcome]) -> list[Figures]:
    """Return the figures of each kind that was tried."""
    false = Counter(
        alarm.partition(" ")[0] for outcome in outcomes for alarm in (*outcome.false, *outcome.false_when_healthy)
    )
    found = []
    for name in dict.fromkeys(outcome.kind for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.kind == name]
        above = [outcome for outcome in mine if outcome.above]
        hits = sum(outcome.found for outcome in mine)
        num_false = false[str(KINDS[name].verdict)]
        found.append(Figures(name, len(mine), hits, num_false, len(above), sum(o.found for o in above)))
    return found


def by_size(outcomes: Sequence[Outcome], name: str) -> Iterator[tuple[float, float, int, float]]:
    """Yield (from, to, cases, recall) of each bucket of sizes that has cases."""
    mine = [outcome for outcome in outcomes if outcome.kind == name]
    low, high = KINDS[name].sizes
    edges = np.geomspace(low, high, NUM_BUCKETS + 1) if high > low else np.array([low, high])
    for begin, end in pairwise(edges):
        inside = [o for o in mine if begin <= o.size < end or (end == high and o.size >= end)]
        if inside:
            yield float(begin), float(end), len(inside), sum(o.found for o in inside) / len(inside)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return precision and recall of each kind, and recall by size, as Markdown."""
    lines = ["| kind | cases with, without | found | false alarms | precision | recall above the limit |"]
    lines.append("|---|---|---|---|---|---|")
    for each in figures(outcomes):
        recall = "-" if each.recall_above is None else f"{each.recall_above:.3f} of {each.num_above}"
        counts = f"{each.num_cases}, {each.num_cases} | {each.num_found} | {each.num_false}"
        lines.append(f"| `{each.kind}` | {counts} | {each.precision:.3f} | {recall} |")
    lines += ["", "| kind | size | recall by size |", "|---|---|---|"]
    for name in dict.fromkeys(outcome.kind for outcome in outcomes):
        parts = [f"{begin:.3g}-{end:.3g}: {recall:.2f} of {n}" for begin, end, n, recall in by_size(outcomes, name)]
        lines.append(f"| `{name}` | {KINDS[name].unit} | {'; '.join(parts)} |")
    return "\n".join(lines)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw recall by size, one panel a kind whose faults have sizes."""
    import altair as alt

    rows = [
        {"kind": f"{name} ({KINDS[name].unit})", "size": float(np.sqrt(begin * end)), "recall": recall, "cases": n}
        for name in dict.fromkeys(outcome.kind for outcome in outcomes)
        if KINDS[name].sizes[0] < KINDS[name].sizes[1]
        for begin, end, n, recall in by_size(outcomes, name)
    ]
    line = alt.Chart(alt.InlineData(values=rows)).mark_line(point=True)
    line = line.encode(
        x=alt.X("size:Q", title="size of the fault", scale=alt.Scale(type="log")),
        y=alt.Y("recall:Q", title="share found", scale=alt.Scale(domain=[0, 1])),
        facet=alt.Facet("kind:N", title=None, columns=3),
    )
    line.properties(width=200, height=120).resolve_scale(x="independent").save(str(path))


def run(kinds: Sequence[str], seeds: Sequence[int], num_processes: int = NUM_PROCESSES) -> Iterator[Outcome]:
    """Yield what came of each case, kind by kind."""
    asked = [(name, seed) for name in kinds for seed in seeds]
    if num_processes == 1:
        yield from (tried(name, seed) for name, seed in asked)
        return
    with ProcessPoolExecutor(num_processes) as pool:
        yield from pool.map(tried, *zip(*asked, strict=True), chunksize=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200, help="Cases of each kind, with the fault and without.")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--svg", type=Path, help="Draw recall by size into this file.")
    asked = parser.parse_args()
    began, outcomes = time.perf_counter(), []
    for outcome in run(asked.kinds, range(asked.first, asked.first + asked.seeds)):
        outcomes.append(outcome)
        if outcome.false or outcome.false_when_healthy or (outcome.above and not outcome.found):
            print(f"  {outcome}", file=sys.stderr, flush=True)
    print(table(outcomes))
    print(f"\n{len(outcomes)} cases and their healthy twins in {time.perf_counter() - began:.0f} s")
    if asked.svg:
        plot(outcomes, asked.svg)
    return 0 if all(each.is_met for each in figures(outcomes)) else 1


if __name__ == "__main__":
    sys.exit(main())
