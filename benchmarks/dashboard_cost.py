"""What watching costs: the dashboard's CPU a viewer, the longest task in a browser, and what requests pay for viewers.

A served model under load sends its records to a collector with its judge; the dashboard reads that store. Viewers are
connections that read the stream of a Pipeline page and throw it away, so that no browser competes for the cores; blocks
with 0, 0 again, 1, 4 and 8 of them take turns, each under the same requests. The browser's part runs by itself: the
page in headless Chromium, fed spans four times a second.

    python benchmarks/dashboard_cost.py            # about seven minutes on two quiet cores
    python benchmarks/dashboard_cost.py --quick    # two

Exit codes: 0, 1 where a process failed, 5 where other processes took too much of the machine to say anything.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from dashboard_rig import CHROMIUM, Browsed, System, browse, cpu_s, system, viewers
from foreign import Foreign
from overhead_figures import MOST_FOREIGN, Ratio, paired

from insitu_engine.processes import ChildFailed, Interrupted

SCHEMA: Final = "insitu.dashboard-cost/1"
NONE, AGAIN = "0", "0 again"
COUNTS: Final = {NONE: 0, AGAIN: 0, "1": 1, "4": 4, "8": 8}
MOST_CORES: Final = 0.1
"""A viewer."""
LONGEST_TASK_MS: Final = 50.0
NUM_SPANS: Final = 2000
SETTLE_S: Final = 3.0
FEWEST_ROUNDS: Final = 2
"""That must have been quiet."""
STAGES: Final = 2


@dataclass(frozen=True, slots=True)
class Block:
    """One stretch of load with a number of viewers."""

    viewers: str
    round: int
    cores: float
    """Of the dashboard process."""
    p50_s: float
    p95_s: float
    completed: int
    failed: int
    kb_per_s: float
    """A viewer."""
    foreign: float
    """Share of all cores that other processes took meanwhile."""


@dataclass(frozen=True)
class Size:
    rounds: int
    seconds: float
    messages: int


FULL: Final = Size(rounds=6, seconds=10.0, messages=60)
QUICK: Final = Size(rounds=2, seconds=6.0, messages=30)


def block(running: System, name: str, number: int, seconds: float, rate: float) -> Block:
    """Measure one block: streams first, then, when they flow, the requests."""
    with viewers(running.dashboard, COUNTS[name]) as got, Foreign() as foreign:
        threading.Event().wait(SETTLE_S)
        before, bytes_before, begun = cpu_s(running.dashboard_pid), sum(got), time.monotonic()
        found = running.load(seconds, rate, number)
        took = time.monotonic() - begun
        cores = (cpu_s(running.dashboard_pid) - before) / took
        kb = (sum(got) - bytes_before) / 1e3 / took / max(1, len(got))
        if not all(got):
            raise RuntimeError(f"{got.count(0)} of {len(got)} streams gave nothing")
    latency = found["latency_s"]
    done, failed = found["completed"], found["failed"]
    return Block(name, number, cores, latency["p50"], latency["p95"], done, failed, kb, foreign.share)


def measure(size: Size, rate: float, seed: int, folder: Path) -> list[Block]:
    """Run all blocks, in an order of its own each round, after one that warms up."""
    order = random.Random(seed)
    found = []
    with system(folder, STAGES) as running:
        block(running, "1", seed, min(4.0, size.seconds), rate)
        for number in range(size.rounds):
            for name in order.sample(list(COUNTS), len(COUNTS)):
                found.append(block(running, name, seed + number, size.seconds, rate))
                last = found[-1]
                said = f"  round {number + 1}, {name} viewers: {last.cores:.3f} cores, others {last.foreign:.0%}"
                click.echo(said, err=True)
    return found


def quiet(blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks of rounds in which other processes left the machine alone."""
    rounds = {each.round for each in blocks}
    noise = {number: float(np.mean([each.foreign for each in blocks if each.round == number])) for number in rounds}
    return [each for each in blocks if noise[each.round] <= MOST_FOREIGN]


def of(blocks: Sequence[Block], name: str, field: str) -> list[float]:
    """Return a figure of the blocks with that many viewers, by round."""
    return [getattr(each, field) for each in sorted(blocks, key=lambda each: each.round) if each.viewers == name]


def per_viewer(blocks: Sequence[Block]) -> dict[str, float]:
    """Return cores a viewer: the median, over rounds, of what a block took more than the one without viewers."""
    base = np.asarray(of(blocks, NONE, "cores"))
    return {
        name: float(np.median((np.asarray(of(blocks, name, "cores")) - base) / count))
        for name, count in COUNTS.items()
        if count
    }


def latency(blocks: Sequence[Block], field: str, seed: int) -> dict[str, Ratio]:
    """Return the latency with viewers over that without, and what the same comparison says of no difference."""
    base = of(blocks, NONE, field)
    return {name: paired(name, base, of(blocks, name, field), seed) for name in (AGAIN, "8")}


def within_noise(found: dict[str, Ratio]) -> bool:
    """Tell whether 8 viewers cannot be told from none: the median is no further from 1 than none is from none."""
    again, eight = found[AGAIN], found["8"]
    noise = max(abs(again.low - 1), abs(again.high - 1))
    return abs(eight.median - 1) <= noise


def document(measured: Sequence[Block], browsed: Browsed | None, seed: int) -> dict[str, Any]:
    """Return everything that was measured, and what became of the targets: from quiet rounds, if there are enough."""
    left = quiet(measured)
    noisy = len(left) < FEWEST_ROUNDS * len(COUNTS)
    blocks = measured if noisy else left
    ratios = {field: latency(blocks, field, seed) for field in ("p50_s", "p95_s")}
    cores = per_viewer(blocks)
    targets = {
        f"at most {MOST_CORES} cores a viewer": "met" if max(cores.values()) <= MOST_CORES else "missed",
        "request latency with 8 viewers within the paired noise": (
            "met" if all(within_noise(each) for each in ratios.values()) else "missed"
        ),
        f"no task over {LONGEST_TASK_MS:.0f} ms": (
            "no browser" if browsed is None else "met" if browsed.longest_task_ms <= LONGEST_TASK_MS else "missed"
        ),
    }
    return {
        "schema": SCHEMA,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "rounds": len(measured) // len(COUNTS),
        "quiet_rounds": len(left) // len(COUNTS),
        "too_noisy": noisy,
        "dashboard_cores": {name: float(np.median(of(blocks, name, "cores"))) for name in COUNTS},
        "cores_per_viewer": cores,
        "kb_per_s": {name: float(np.median(of(blocks, name, "kb_per_s"))) for name in COUNTS if COUNTS[name]},
        "latency_ms": {
            name: {p: float(np.median(of(blocks, name, f"{p}_s"))) * 1e3 for p in ("p50", "p95")} for name in COUNTS
        },
        "latency_over_none": {field: {n: asdict(r) for n, r in each.items()} for field, each in ratios.items()},
        "browser": None if browsed is None else asdict(browsed),
        "targets": {name: "too noisy" if noisy and told != "no browser" else told for name, told in targets.items()},
        "blocks": [asdict(each) for each in measured],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the document in words."""
    said = ["viewers   dashboard, cores   cores a viewer   kB/s a viewer   request p50, ms   p95, ms"]
    for name in COUNTS:
        cores, rate = found["cores_per_viewer"].get(name), found["kb_per_s"].get(name)
        figures = found["latency_ms"][name]
        said.append(
            f"{name:<9} {found['dashboard_cores'][name]:>16.3f} {'' if cores is None else f'{cores:.3f}':>16} "
            f"{'' if rate is None else f'{rate:.0f}':>15} {figures['p50']:>17.0f} {figures['p95']:>9.0f}"
        )
    for field, each in found["latency_over_none"].items():
        for name, ratio in each.items():
            said.append(
                f"{field[:-2]} with {name} viewers over none: {ratio['median']:.3f} "
                f"[{ratio['low']:.3f}, {ratio['high']:.3f}], {ratio['num_pairs']} pairs"
            )
    if found["browser"] is not None:
        each = found["browser"]
        said.append(
            f"browser: {NUM_SPANS} new spans a message, 4 messages a second, {each['num_messages']} messages, "
            f"{each['num_spans']} spans held: longest task {each['longest_task_ms']:.0f} ms (0: none over 50 ms), "
            f"drawing {each['draw_ms']:.1f} ms"
        )
    said.append(
        f"{found['quiet_rounds']} of {found['rounds']} rounds were quiet (other processes took at most "
        f"{MOST_FOREIGN:.0%} of the cores); {'all' if found['too_noisy'] else 'only these'} are shown"
    )
    return [*said, *(f"{name}: {told}" for name, told in found["targets"].items())]


@click.command()
@click.option("--rounds", type=click.IntRange(1), help=f"[default: {FULL.rounds}]")
@click.option("--seconds", type=click.FloatRange(1), help=f"Of load a block. [default: {FULL.seconds}]")
@click.option("--rate", default=4.0, show_default=True, help="Requests a second.")
@click.option("--quick", is_flag=True, help="Less of everything.")
@click.option("--seed", default=0)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(rounds: int | None, seconds: float | None, rate: float, quick: bool, seed: int, as_json: bool) -> None:
    """Measure what watching costs."""
    size = QUICK if quick else FULL
    size = Size(rounds or size.rounds, seconds or size.seconds, size.messages)
    browsed = browse(NUM_SPANS, size.messages) if CHROMIUM.exists() else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            blocks = measure(size, rate, seed, Path(folder))
    except (ChildFailed, Interrupted) as error:
        raise click.ClickException(str(error) or "interrupted; nothing was concluded") from None
    found = document(blocks, browsed, seed)
    click.echo(json.dumps(found) if as_json else "\n".join(lines(found)))
    sys.exit(5 if found["too_noisy"] else 0)


if __name__ == "__main__":
    main()
