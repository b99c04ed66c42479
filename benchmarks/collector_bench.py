"""How fast the collector makes things durable, against the bare disk and against peers, and what a kill costs.

Parts, all of them on real processes and the disk of the working folder:

- `frames`: 1 MiB frames of captures, in turns with a bare write + fdatasync in groups of 8 MiB; a load generator and
  the collector share the cores. Rates, times until acknowledged, CPU and memory of each process.
- `recovery`: kill -9 amid frames, then a start on what was left, against reading those files and their checksums.
- `otlp`: spans of 512 a request over OTLP/gRPC, into the collector and into Phoenix.
- `query`: what reading costs (`benchmarks/query_cost.py`).

    make bench-collector                      # 5 GiB of frames, 10 million rows to ask for, some twenty minutes
    make bench-collector ARGS=--quick         # about two
    make bench-collector ARGS="--part frames --json"

Exit codes: 0, 1 where something acknowledged is not in the store, 5 where the machine is too noisy to judge.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click
import query_cost
from collector_report import frame_lines, recovery_lines, span_lines
from collector_results import FramesResult, RecoveryResult, SpansResult, spans_targets
from collector_runs import FULL, QUICK, frames, recovery
from otlp_runs import INSITU, spans
from overhead import machine
from workers import WorkerError

from insitu_engine.processes import ChildFailed

ROOT: Final = Path(__file__).resolve().parents[1]
PARTS: Final = ("frames", "recovery", "otlp", "query")
PHOENIX_PYTHON: Final = ROOT / ".venv-phoenix" / "bin" / "python"

Say = Callable[[Iterator[str]], None]


def run(parts: Sequence[str], quick: bool, seed: int, phoenix: Path, folder: Path, say: Say) -> dict[str, Any]:
    """Measure what is asked for; `say` gets the lines of each part as it ends."""
    size = QUICK if quick else FULL
    found: dict[str, Any] = {}
    for part in parts:
        (at := folder / part).mkdir()
        if part == "frames":
            found[part] = frames(size, seed, at)
            say(frame_lines(found[part]))
        elif part == "recovery":
            found[part] = recovery(size, seed, at)
            say(recovery_lines(found[part]))
        elif part == "otlp":
            found[part] = spans(quick, phoenix, at)
            say(span_lines(found[part], spans_targets(found[part], INSITU)))
        else:
            found[part] = query_cost.costs(query_cost.QUICK if quick else query_cost.FULL, at)
            say(iter(query_cost.report(found[part])))
    return found


@click.command()
@click.option("--quick", is_flag=True, help="320 MiB of frames and fewer rounds: about two minutes.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="[default: all]")
@click.option("--seed", default=0)
@click.option("--phoenix-python", type=click.Path(path_type=Path), default=PHOENIX_PYTHON, help="Where Phoenix is.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON document there too.")
def main(quick: bool, parts: Sequence[str], seed: int, phoenix_python: Path, as_json: bool, out: Path | None) -> None:
    """Measure what the collector takes, against the disk and against peers, and say how sure that is."""
    with tempfile.TemporaryDirectory(prefix="insitu-collector-bench-", dir=Path.cwd()) as folder:
        try:
            results = run(
                parts or PARTS,
                quick,
                seed,
                phoenix_python,
                Path(folder),
                lambda lines: None if as_json else click.echo("\n".join(lines)),
            )
        except (WorkerError, ChildFailed) as error:
            raise click.ClickException(str(error)) from None
    document = {
        "schema": "insitu.bench.collector/1",
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "quick": quick,
        "seed": seed,
        "parts": {name: _plain(found) for name, found in results.items()},
    }
    if as_json:
        click.echo(json.dumps(document))
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(_conclude(results))


def _plain(found: Any) -> Any:
    """Return a result as JSON has it, with what it says of its targets."""
    if isinstance(found, dict):
        return found
    if isinstance(found, FramesResult | RecoveryResult):
        return {**asdict(found), "targets": found.targets, "noise": found.noise}
    return {"receivers": [asdict(each) for each in found], "targets": spans_targets(found, INSITU)}


def _conclude(results: dict[str, Any]) -> int:
    """Say on stderr what stands in the way of a conclusion; return the exit code."""
    judged: list[tuple[str, FramesResult | RecoveryResult | SpansResult]] = []
    for part, found in results.items():
        if isinstance(found, list):
            judged += [(each.receiver, each) for each in found]
        elif not isinstance(found, dict):
            judged.append((part, found))
    for _, result in judged:
        for reason in result.noise:
            click.echo(f"too noisy: {reason}", err=True)
    wrong = [name for name, result in judged if not result.is_right]
    for name in wrong:
        click.echo(f"{name}: what was acknowledged is not what is stored", err=True)
    if wrong:
        return 1
    return 5 if any(result.noise for _, result in judged) else 0


if __name__ == "__main__":
    main()
