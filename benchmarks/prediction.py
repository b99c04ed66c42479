"""Does a predicted gain come true? Predicted from a recorded run, then the change is made and measured.

Two ranks serve tiny-llama; users in a closed loop keep both busy. Each pair is a base run (layers 4,4, two
micro-batches in flight) and, right after it, the same requests with another split and number in flight, of the seed.
The base's store says what the change should do (`insitu stalls --if`), the second store what it did: sampled tokens a
second, without the first and last second of the load.

    python benchmarks/prediction.py              # 20 pairs, about ten minutes of both cores
    python benchmarks/prediction.py --pairs 3

A pair is right when the measured throughput ratio is within 30 % of the predicted ratio, |measured - predicted| /
predicted; the error of the gain itself is printed beside it. Met: 9 of 10 pairs are right. A pair in which others took
more of the cores than `MOST_FOREIGN`, or unlike shares in its two runs, is repeated once, and then counted apart.

Exit codes: 0 met, 1 missed or a process failed, 5 where too few pairs were quiet to say anything.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
from foreign import Foreign

from insitu_collector.evidence import Evidence
from insitu_collector.rows.slices import JUDGED, Groups, latest
from insitu_collector.store import open_store
from insitu_collector.whatif.changes import Change
from insitu_collector.whatif.predict import WhatIf, tokens_per_s
from insitu_collector.whatif.report import what_if
from insitu_engine.processes import ChildFailed, Children, Interrupted

SCHEMA: Final = "insitu.prediction/1"
BASE: Final = ((4, 4), 2)
MOST_IN_FLIGHT: Final = 4
USERS: Final = 12
WITHIN: Final = 0.30
RIGHT_SHARE: Final = 0.9
MOST_FOREIGN: Final = 0.15
"""Share of the cores that others may take in a run, and by which the runs of a pair may differ."""
QUIET_SHARE: Final = 0.5
"""Of the pairs, at least, for anything to be said."""
BEGIN_NS, END_NS = 1_500_000_000, 1_000_000_000
"""Left out after the first step and before the last: users come and go there."""
READY_S: Final = 90.0
EXIT_MISSED, EXIT_DISTURBED = 1, 5


@dataclass(frozen=True, slots=True)
class Row:
    """One pair."""

    split: tuple[int, int]
    in_flight: int
    tokens_per_s: tuple[float, float]
    """Base and changed."""
    predicted: float
    measured: float
    """Throughput ratios."""
    residual: float
    foreign: tuple[float, float]
    again: bool

    @property
    def error(self) -> float:
        return self.measured / self.predicted - 1.0

    @property
    def is_right(self) -> bool:
        return abs(self.error) <= WITHIN

    @property
    def is_quiet(self) -> bool:
        return max(self.foreign) <= MOST_FOREIGN

    def __str__(self) -> str:
        return (
            f"{self.split[0]},{self.split[1]:<6}{self.in_flight:>9}{self.tokens_per_s[0]:>9.0f}{self.tokens_per_s[1]:>9.0f}"
            f"{self.predicted:>11.2f}{self.measured:>10.2f}{100 * self.error:>+8.0f} %"
            f"{100 * (self.measured - self.predicted):>+8.0f} points{100 * self.residual:>9.1f} %"
            f"{100 * self.foreign[0]:>6.0f} % {100 * self.foreign[1]:>3.0f} %{'  again' if self.again else ''}"
        )


HEAD: Final = (
    "layers  in flight     base  changed  predicted  measured     error  of the gain    residual   "
    "foreign (base, changed)"
)


def drawn(seed: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield splits and numbers in flight, never the base's, for ever."""
    rng, layers = random.Random(seed), sum(BASE[0])
    while True:
        first = rng.randint(1, layers - 1)
        found = (first, layers - first), rng.randint(1, MOST_IN_FLIGHT)
        if found != BASE:
            yield found


def run_load(folder: Path, split: tuple[int, int], in_flight: int, seconds: float, seed: int) -> float:
    """Serve and load once, recorded into `folder`; return the share of the cores that others took meanwhile.

    Raises ChildFailed.
    """
    with Children() as children:
        options = ["--stages", "2", "--split", ",".join(map(str, split)), "--in-flight", str(in_flight), "--port", "0"]
        serve = children.start("insitu serve", ["serve", *options, "--to", f"file://{folder}"])
        url = serve.wait_for_line(r"ready on (http://[\w.:]+)", READY_S, children.interrupted)[1]
        users = ["--concurrency", str(USERS), "--seconds", str(seconds), "--seed", str(seed), "--quiet"]
        with Foreign() as foreign:
            load = children.start("insitu load", ["load", "--url", url, *users], vital=False)
            load.process.wait(timeout=seconds + READY_S)
            load.join()
        children.check()
        if load.process.returncode or json.loads(load.stdout[-1])["failed"]:
            raise load.failure()
    return foreign.share


def recorded(store: Path) -> WhatIf:
    """Return what can be asked of a recorded run. Raises ChildFailed for one that recorded too little."""
    opened = open_store(store)
    groups = Groups().sort({name: opened.table(name) for name in JUDGED})
    group = latest(groups)
    evidence = Evidence()
    evidence.add(groups[group] if group else {})
    begin, end = evidence.traffic_ns or (0, 0)
    found = what_if(evidence, begin + BEGIN_NS, end - END_NS) if group else None
    if found is None:
        raise ChildFailed(f"{store} holds too few steps; give more --seconds")
    return found


def pair(folder: Path, split: tuple[int, int], in_flight: int, seconds: float, seed: int, again: bool) -> Row:
    """Run the base, predict, make the change, measure. Raises ChildFailed."""
    base, changed = folder / "base", folder / "changed"
    shares = run_load(base, *BASE, seconds, seed), run_load(changed, split, in_flight, seconds, seed)
    before = recorded(base)
    found = before.predict(Change(split=split, in_flight=in_flight))
    tokens = tokens_per_s(before.graph), tokens_per_s(recorded(changed).graph)
    return Row(split, in_flight, tokens, found.throughput, tokens[1] / tokens[0], found.residual, shares, again)


def summary(rows: list[Row]) -> tuple[str, int]:
    """Return what the pairs say together, and the exit code."""
    quiet = [row for row in rows if row.is_quiet]
    right = sum(row.is_right for row in quiet)
    errors = sorted(abs(row.error) for row in quiet)
    if len(quiet) < max(1, QUIET_SHARE * len(rows)):
        return f"others took too much of the cores in {len(rows) - len(quiet)} of {len(rows)} pairs", EXIT_DISTURBED
    met = right >= RIGHT_SHARE * len(quiet)
    return (
        f"{right} of {len(quiet)} quiet pairs within {100 * WITHIN:.0f} % ({'met' if met else 'missed'}); median error "
        f"{100 * errors[len(errors) // 2]:.0f} %, largest {100 * errors[-1]:.0f} %; of all {len(rows)} pairs "
        f"{sum(row.is_right for row in rows)} are",
        0 if met else EXIT_MISSED,
    )


@click.command()
@click.option("--pairs", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=5), default=8.0, show_default=True, help="Of load, each run.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes the pairs and what is sent.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, rows on stderr.")
def main(pairs: int, seconds: float, seed: int, as_json: bool) -> None:
    """Measure how well a replay predicts the throughput of another split and another number in flight."""
    rows: list[Row] = []
    click.echo(HEAD, err=as_json)
    try:
        for number, (split, in_flight) in zip(range(pairs), drawn(seed), strict=False):
            for again in (False, True):
                with tempfile.TemporaryDirectory(prefix="insitu-prediction-") as folder:
                    row = pair(Path(folder), split, in_flight, seconds, seed + number, again)
                if row.is_quiet:
                    break
            rows.append(row)
            click.echo(str(row), err=as_json)
    except ChildFailed as error:
        raise click.ClickException(str(error)) from None
    except Interrupted:
        sys.exit(130)
    said, code = summary(rows)
    document: dict[str, Any] = {"schema": SCHEMA, "said": said, "seed": seed, "rows": [asdict(row) for row in rows]}
    click.echo(json.dumps(document) if as_json else said)
    sys.exit(code)


if __name__ == "__main__":
    main()
