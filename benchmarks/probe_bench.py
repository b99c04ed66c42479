"""What the probe costs a step, and what it costs to keep the rows of all layers: against detached, and against peers.

Each ratio is of pairs: both sides in one process and one round, in random order, with an A/A pair beside it. Parts:

- `micro`: a tap, an interval and the time around a step, in ns.
- `steps`: single steps in memory, eager and compiled: off, idle, T0, T1.
- `stored`: blocks of steps until all that they left is durable: T0, T1 in 1 of 16, and the rows of all layers, by
  insitu, hooks, `output_hidden_states`, nnsight and TransformerLens, each read from the disk again and compared.

    make bench-probe                    # all of it, about twelve minutes on two quiet cores
    make bench-probe ARGS=--quick       # about two
    make bench-probe ARGS="--part micro --json"

Exit codes: 0, 1 where rows are missing or wrong, 5 where the machine is too noisy to judge.
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
from llamas import NAMES
from overhead import machine
from probe_gpu import measure_on_cuda
from probe_report import cost_lines, step_lines, stored_lines
from probe_results import Steps, Stored, cost_targets, is_right, step_targets, stored_targets
from probe_runs import BATCH, Plan, Size, micro, steps, stored

ROOT: Final = Path(__file__).resolve().parents[1]
PEERS_PYTHON: Final = ROOT / ".venv-peers" / "bin" / "python"
PARTS: Final = ("micro", "steps", "stored")
MODES: Final = ("eager", "compiled")
PROMPT: Final = 64
"""Tokens of a prompt; two of them are a step."""
FULL: Final = {"tiny": Size(600, 20, 32), "100m": Size(150, 12, 8), "least": Size(600, 20, 16)}
QUICK: Final = {"tiny": Size(150, 8, 32), "100m": Size(30, 6, 4), "least": Size(150, 8, 16)}
MICRO_ROUNDS: Final = 400


def run(plan: Plan, say: Callable[[Iterator[str]], None]) -> dict[str, Any]:
    """Measure what is asked for; `say` gets the lines of each part as it ends."""
    results: dict[str, list[Any]] = {"costs": [], "steps": [], "stored": []}
    if "micro" in plan.parts:
        results["costs"] = micro(plan)
        say(cost_lines(results["costs"], cost_targets(results["costs"])))
    for mode in plan.modes:
        for model in plan.models:
            if "steps" in plan.parts:
                results["steps"].append(one := steps(plan, model, mode))
                say(step_lines(one, step_targets(one)))
            for batch, tokens in [(BATCH, 1), (2, PROMPT)] if "stored" in plan.parts else []:
                if tokens == 1 or (plan.prompts and mode == "eager"):
                    results["stored"].append(kept := stored(plan, model, mode, batch, tokens))
                    say(stored_lines(kept, stored_targets(kept)))
    return results


@click.command()
@click.option("--quick", is_flag=True, help="The tiny model alone and fewer rounds: about two minutes.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="[default: all]")
@click.option("--model", "models", multiple=True, type=click.Choice(NAMES), help="[default: tiny and 100m]")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="[default: both]")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of single steps. [default: tiny 600, 100m 150]")
@click.option("--blocks", type=click.IntRange(1), help="Rounds of blocks. [default: tiny 20, 100m 12]")
@click.option("--seed", default=0)
@click.option("--peers-python", type=click.Path(path_type=Path), default=PEERS_PYTHON, help="Where libraries are.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON document there too.")
def main(
    quick: bool,
    parts: Sequence[str],
    models: Sequence[str],
    modes: Sequence[str],
    rounds: int | None,
    blocks: int | None,
    seed: int,
    peers_python: Path,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure what the probe costs, against detached and against peers, and say how sure that is."""
    usual = QUICK if quick else FULL
    sizes = {name: Size(rounds or size.rounds, blocks or size.blocks, size.steps) for name, size in usual.items()}
    with tempfile.TemporaryDirectory(prefix="insitu-probe-bench-", dir=Path.cwd()) as folder:
        plan = Plan(
            parts or PARTS,
            models or (("tiny",) if quick else ("tiny", "100m")),
            modes or MODES,
            sizes,
            min(rounds or MICRO_ROUNDS, MICRO_ROUNDS),
            prompts=not quick,
            seed=seed,
            peers_python=peers_python,
            folder=Path(folder),
        )
        results = run(plan, lambda lines: None if as_json else click.echo("\n".join(lines)))
    cuda = measure_on_cuda(seed)
    if not as_json:
        click.echo("\n".join(cuda["lines"]))
    document = {
        "schema": "insitu.bench.probe/1",
        "machine": {**machine(), "load": os.getloadavg()[0]},
        "quick": quick,
        "seed": seed,
        "cuda": cuda,
        **{name: [asdict(each) for each in found] for name, found in results.items()},
    }
    if as_json:
        click.echo(json.dumps(document))
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(_conclude([*results["steps"], *results["stored"]]))


def _conclude(results: Sequence[Steps | Stored]) -> int:
    """Say on stderr what stands in the way of a conclusion; return the exit code."""
    for result in results:
        where = f"{result.model}, {result.mode}"
        for reason in result.noise:
            click.echo(f"too noisy: {where}: {reason}", err=True)
        for name, check in result.checks.items():
            if not check["holds"]:
                click.echo(f"{where}: {name}: what is on the disk is not what was to be kept: {check}", err=True)
    if not all(map(is_right, results)):
        return 1
    return 5 if any(result.noise for result in results) else 0


if __name__ == "__main__":
    main()
