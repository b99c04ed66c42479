"""Did the probe get slower? The same small parts and steps, by this version and by older ones, in turns.

Each version runs in processes of its own, which work one at a time, in random order within each round; the figures of
a round are paired. Processes differ by themselves (where memory lies, say), so they are started anew a few times, and a
second process of this version is the A/A pair.

    python benchmarks/two_versions.py 5c20946
    python benchmarks/two_versions.py 5c20946 2e6914f --rounds 20 --json
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from foreign import Foreign
from llamas import NAMES
from overhead_figures import Cost, Ratio, cost, paired
from variant_names import DETACHED, LONG, SHORT, T0
from workers import Worker

ROOT: Final = Path(__file__).resolve().parents[1]
THIS, AGAIN = "this version", "A/A (this version again)"
WIDTH: Final = 192
INNER_ROUNDS: Final = 8
"""Of the smallest parts, and of steps, in one turn of a process."""
Figures = Mapping[str, float]
"""Seconds of one turn, by what was done."""


def extract(revision: str, folder: Path) -> Path:
    """Return where the probe of an older version lies, put there from the repository's history."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision, "probe"], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder / revision, filter="data")
    return folder / revision / "probe"


def turn(worker: Worker, seed: int) -> Figures:
    """Return what one process takes now: medians of a few inner rounds."""
    small = worker.ask("micro", rounds=INNER_ROUNDS, seed=seed, width=WIDTH)
    model = worker.ask("steps", variants=[DETACHED, T0], rounds=INNER_ROUNDS, seed=seed)["wall"]
    at = {name: np.asarray(values) for name, values in {**small, **model}.items()}
    short, long = (at[f"tapped {n}"] - at[f"bare {n}"] for n in (SHORT, LONG))
    found = {
        "a tap": (long - short) / (LONG - SHORT),
        f"a step of {LONG} taps": long,
        "around a step": at["around"],
        "an interval": at["interval host"] - at["loop"],
        f"a bare step of {LONG} modules": at[f"bare {LONG}"],
        "a step of the model, T0": at[T0],
        "a step of the model, detached": at[DETACHED],
    }
    return {name: float(np.median(values)) for name, values in found.items()}


def generation(
    places: Mapping[str, Path], model: str, rounds: int, seed: int, folder: Path
) -> dict[str, list[Figures]]:
    """Start a process of each version, let them take turns, and end them."""
    order, found = random.Random(seed), {name: list[Figures]() for name in places}
    job = {"model": model, "batch": 8, "tokens": 1, "compiled": False, "seed": 0}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                Worker(sys.executable, job, folder / str(at), {"PYTHONPATH": str(place), "INSITU_RUN": "0" * 16})
            )
            for at, (name, place) in enumerate(places.items())
        }
        for worker in workers.values():
            for variant in (DETACHED, T0):
                worker.ask("open", variant=variant)
            turn(worker, seed)
        for round_ in range(rounds):
            for name in order.sample(list(workers), len(workers)):
                found[name].append(turn(workers[name], seed + round_))
    return found


def ratios(found: Mapping[str, Sequence[Figures]], seed: int) -> dict[str, list[Ratio]]:
    """Return by what was done the time of this version over that of each other."""
    names = list(found[THIS][0])
    columns = {who: {name: [each[name] for each in turns] for name in names} for who, turns in found.items()}
    return {
        name: [
            paired(AGAIN if who == AGAIN else f"this / {who}", columns[who][name], columns[THIS][name], seed)
            for who in found
            if who != THIS
        ]
        for name in names
    }


def costs(found: Mapping[str, Sequence[Figures]], seed: int) -> list[Cost]:
    return [
        cost(f"{name}: {who}", [each[name] for each in turns], seed)
        for who, turns in found.items()
        for name in turns[0]
    ]


@click.command()
@click.argument("revisions", nargs=-1, required=True)
@click.option("--model", type=click.Choice(NAMES), default="tiny")
@click.option("--processes", default=4, type=click.IntRange(1), help="How often processes are started anew.")
@click.option("--rounds", default=12, type=click.IntRange(1), help="Turns of each process.")
@click.option("--seed", default=0)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def main(revisions: Sequence[str], model: str, processes: int, rounds: int, seed: int, as_json: bool) -> None:
    """Compare what the probe costs with what older versions cost."""
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="insitu-versions-") as folder:
        here = ROOT / "probe"
        places = {THIS: here, AGAIN: here, **{name: extract(name, Path(folder)) for name in revisions}}
        with Foreign() as foreign:
            for number in range(processes):
                part = generation(places, model, rounds, seed + 1000 * number, Path(folder) / f"run-{number}")
                for name, turns in part.items():
                    found.setdefault(name, []).extend(turns)
    compared, each = ratios(found, seed), costs(found, seed)
    document: dict[str, Any] = {
        "schema": "insitu.bench.versions/1",
        "model": model,
        "foreign_share": foreign.share,
        "ratios": {name: [asdict(ratio) for ratio in of] for name, of in compared.items()},
        "costs": [asdict(one) for one in each],
    }
    if as_json:
        click.echo(json.dumps(document))
        return
    for name, of in compared.items():
        click.echo(name)
        for ratio in of:
            click.echo(f"  {ratio.name:28} {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]  {ratio.num_pairs}")
    for one in each:
        click.echo(f"  {one.name:60} {one.median_ns / 1e3:9.3f} us [{one.low_ns / 1e3:.3f}, {one.high_ns / 1e3:.3f}]")
    click.echo(f"other processes took {foreign.share:.1%} of the cores")


if __name__ == "__main__":
    main()
