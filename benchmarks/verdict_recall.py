"""How often the judge is right on simulated runs whose fault is known: precision, and recall by size of the fault.

`python benchmarks/verdict_recall.py --seeds 200`; exits 1 when a kind is under the bar. With `--out FILE` a round can
be made in parts: what the file has is not run again.

Each case is a run of `insitu_collector.simulate` with random times, arrivals, noise and a fault drawn by its seed, and
the same run without the fault, both fed to the judgement a second at a time. Right: the verdict expected, on the rank
expected. False: any other alarm, on any run, or one that was withdrawn. Missed: the verdict was not said. Whether
prompts or memory delay requests is looked up in the run itself, whatever it was made for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pyarrow as pa
from recall_cases import KINDS, Case, draw
from recall_figures import Outcome, figures, read, table, written
from recall_truth import memory_share, prompt_share

from insitu.vocabulary import VerdictKind
from insitu_collector.judge.judgement import Judgement
from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import Scenario, simulate
from insitu_collector.verdicts.finding import Verdict, standing

NUM_PROCESSES: Final = 2
QUIET: Final = frozenset((VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE))
Tried = tuple[str, int]
"""(kind, seed)"""


def judge(tables: dict[str, pa.Table]) -> list[Verdict]:
    """Return every revision the judgement of a run writes."""
    judgement = Judgement()
    told: list[Verdict] = []
    for part in seconds(tables):
        told += judgement.look(part)
    return told + judgement.look({}, final=True)


def alarms(told: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts that say something is wrong: those that stand, and those that were withdrawn."""
    withdrawn = [verdict for verdict in told if verdict.state == "revised"]
    return [verdict for verdict in [*standing(list(told)), *withdrawn] if verdict.kind not in QUIET]


def tried(name: str, seed: int) -> Outcome:
    """Judge one case and its healthy twin."""
    kind, case = KINDS[name], draw(name, seed)
    tables, without = simulate(case.scenario), simulate(case.healthy)
    told, twin = judge(tables), judge(without)
    said = alarms(told)
    wrong = [v for v in said if not is_expected(v, case) and not is_so(v, case.scenario, tables)]
    return Outcome(
        kind=name,
        seed=seed,
        size=case.size if kind.measure is None else kind.measure(case.scenario, tables, without),
        limit=kind.limit(case, twin, tables),
        found=any(is_expected(verdict, case) for verdict in said),
        false=named(wrong),
        false_when_healthy=named(v for v in alarms(twin) if not is_so(v, case.healthy, without)),
        healthy=[verdict.kind for verdict in standing(twin)] == [VerdictKind.HEALTHY],
    )


def is_expected(verdict: Verdict, case: Case) -> bool:
    """Tell whether a verdict is what should stand, at the place where it should."""
    at_rank = case.rank in (None, verdict.on_rank)
    at_layer = case.layer is None or verdict.layer == case.layer
    return verdict.kind in case.expected and at_rank and at_layer and verdict.state != "revised"


def is_so(verdict: Verdict, scenario: Scenario, tables: dict[str, pa.Table]) -> bool:
    """Tell whether the run has what a verdict on requests says, whatever it was made for: full slots bring it too."""
    kind = KINDS.get(str(verdict.kind))
    if kind is None or kind.measure not in (memory_share, prompt_share):
        return False
    limit = kind.limit(draw(kind.verdict, scenario.seed), (), tables)
    return limit is not None and kind.measure(scenario, tables, {}) >= limit


def named(told: Iterable[Verdict]) -> tuple[str, ...]:
    return tuple(f"{verdict.kind} on rank {verdict.on_rank}" for verdict in told)


def run(asked: Sequence[Tried], num_processes: int = NUM_PROCESSES) -> Iterator[Outcome]:
    """Yield what came of each case, in order."""
    if num_processes == 1 or not asked:
        yield from (tried(name, seed) for name, seed in asked)
        return
    with ProcessPoolExecutor(num_processes) as pool:
        yield from pool.map(tried, *zip(*asked, strict=True), chunksize=4)


def told_as_they_come(asked: Sequence[Tried], num_processes: int, out: Path | None) -> list[Outcome]:
    """Return what came of each case; odd ones are printed, all are added to `out`, as soon as they are known."""
    outcomes = []
    with ExitStack() as stack:
        file = stack.enter_context(out.open("a")) if out else None
        for outcome in run(asked, num_processes):
            outcomes.append(outcome)
            if file:
                print(written(outcome), file=file, flush=True)
            if outcome.is_odd:
                print(f"  {outcome}", file=sys.stderr, flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200, help="Cases of each kind, with the fault and without.")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--processes", type=int, default=NUM_PROCESSES)
    parser.add_argument("--out", type=Path, help="Add outcomes to this file; what it has already is not run again.")
    parser.add_argument("--from", dest="parts", nargs="*", type=Path, help="Run nothing: read these files of --out.")
    parser.add_argument("--svg", type=Path, help="Draw recall by size into this file.")
    asked = parser.parse_args()
    began = time.perf_counter()
    outcomes = read(asked.parts if asked.parts is not None else [asked.out] if asked.out and asked.out.exists() else [])
    if asked.parts is None:
        known = {(outcome.kind, outcome.seed) for outcome in outcomes}
        wanted = [(name, seed) for name in asked.kinds for seed in range(asked.first, asked.first + asked.seeds)]
        wanted = [case for case in wanted if case not in known]
        outcomes += told_as_they_come(wanted, asked.processes, asked.out)
        print(f"{len(wanted)} cases and their healthy twins in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(table(outcomes))
    if asked.svg:
        from recall_plot import plot  # altair takes a second to load

        plot(outcomes, asked.svg)
    return 0 if all(each.is_met for each in figures(outcomes)) else 1


if __name__ == "__main__":
    sys.exit(main())
