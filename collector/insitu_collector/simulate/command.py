"""`insitu simulate`: a store as a run of up to 512 ranks would have left it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from insitu.cli import StorePath
from insitu.segments.shard import ShardWriter
from insitu_collector.simulate.recorded import RecordedService, recorded_steps, shipped_steps
from insitu_collector.simulate.run import append, processes
from insitu_collector.simulate.scenario import MOST_RANKS, Fault, Scenario
from insitu_collector.simulate.spec import FORMS, parse_fault

SCHEMA: Final = "insitu.simulate/1"
_NEEDED: Final = ("sources", "steps", "intervals", "health")


def _faults(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[Fault, ...]:
    try:
        return tuple(parse_fault(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("simulate")
@click.option("--store", required=True, type=StorePath(), help="A new folder.")
@click.option(
    "--seconds", default=30.0, show_default=True, type=click.FloatRange(min=0), help="Traffic, after warm-up."
)
@click.option("--seed", default=0, show_default=True, help="Fixes everything that is drawn.")
@click.option("--stages", default=2, show_default=True, type=click.IntRange(1, MOST_RANKS), help="Pipeline stages.")
@click.option("--tensor-parallel", default=1, show_default=True, type=click.IntRange(1), help="Ranks of a stage.")
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(1), help="Pipelines side by side.")
@click.option("--hosts", default=1, show_default=True, type=click.IntRange(1), help="Each with clocks of its own.")
@click.option("--in-flight", type=click.IntRange(1), help="Micro-batches of a pipeline.  [default: one a stage]")
@click.option(
    "--rate", default=8.0, show_default=True, type=click.FloatRange(min=0.01), help="Requests/s of a replica."
)
@click.option("--experts", default=0, show_default=True, type=click.IntRange(0), help="Of each layer; 0: dense layers.")
@click.option("--fault", "faults", multiple=True, callback=_faults, metavar="SPEC", help=f"What goes wrong: {FORMS}.")
@click.option(
    "--from",
    "recorded",
    type=click.Path(path_type=Path),
    help="Take service times from the latest run of this store.  [default: a recorded run of the tiny-llama]",
)
@click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA}).")
def simulate(store: Path, recorded: Path | None, as_json: bool, **asked: Any) -> None:
    """Write a store as a run would have left it, without a model: for trying pages and tools at any size.

    SPEC ends in @START[-END], seconds of traffic. RANKS is [rREPLICA/]STAGE[.TP], HOST is hNUMBER. What goes wrong is
    printed here and nowhere written.

    \b
    insitu simulate --store ./simulated --stages 4 --fault slow=2:20@10
    insitu simulate --store ./fleet --seconds 5 --tensor-parallel 4 --replicas 2 --hosts 2 --json
    """
    if (store / "v1").exists():
        raise click.ClickException(f"{store} has a store already; a simulated run needs a folder of its own")
    began = time.perf_counter()
    try:
        scenario = _scenario(**asked)
        service = RecordedService(_steps(recorded), scenario.stages)
        counts = _write(scenario, service, store)
    except (ValueError, OSError) as error:
        refused = error.strerror if isinstance(error, OSError) else None  # by the system, and not by us
        said = f"{store} cannot be written: {refused.lower()}; give another --store" if refused else str(error)
        raise click.ClickException(said) from None
    told = _document(store, scenario, counts, time.perf_counter() - began)
    click.echo(json.dumps(told, indent=1) if as_json else _text(told))


def _scenario(
    *,
    seconds: float,
    seed: int,
    stages: int,
    tensor_parallel: int,
    replicas: int,
    hosts: int,
    in_flight: int | None,
    rate: float,
    experts: int,
    faults: tuple[Fault, ...],
) -> Scenario:
    return Scenario(
        seed=seed,
        seconds=seconds,
        base_ms=(0.0,) * stages,
        in_flight=in_flight or stages,
        requests_per_s=rate,
        experts=experts,
        faults=faults,
        tensor_parallel=tensor_parallel,
        replicas=replicas,
        hosts=hosts,
    )


def _steps(recorded: Path | None) -> Any:
    if recorded is None:
        return shipped_steps()
    from insitu_collector.opening import opened

    with opened(recorded) as store:
        return recorded_steps({name: store.table(name) for name in _NEEDED})


def _write(scenario: Scenario, service: RecordedService, path: Path) -> dict[str, int]:
    """Write the store, a process at a time; return the rows of each table."""
    counts: dict[str, int] = {}
    seqs: dict[tuple[int, str], int] = {}
    writer = ShardWriter(path, "simulated")
    try:
        for tables in processes(scenario, service):
            append(writer, tables, seqs)
            for name, table in tables.items():
                counts[name] = counts.get(name, 0) + table.num_rows
    finally:
        writer.close()
    return counts


def _document(store: Path, scenario: Scenario, counts: dict[str, int], took_s: float) -> dict[str, Any]:
    grid = {"replicas": scenario.replicas, "stages": scenario.stages, "tensor_parallel": scenario.tensor_parallel}
    return {
        "schema": SCHEMA,
        "store": str(store),
        "seed": scenario.seed,
        "seconds": scenario.seconds,
        **grid,
        "hosts": scenario.hosts,
        "faults": [asdict(fault) for fault in scenario.faults],
        "rows": counts,
        "took_s": round(took_s, 2),
    }


def _text(told: dict[str, Any]) -> str:
    ranks = told["replicas"] * told["stages"] * told["tensor_parallel"]
    lines = [
        f"{told['store']}: {ranks} ranks ({told['replicas']} replicas x {told['stages']} stages x "
        f"{told['tensor_parallel']}), {told['seconds']:g} s of traffic, {sum(told['rows'].values())} rows, "
        f"in {told['took_s']:.1f} s"
    ]
    lines += [f"  wrong on purpose: {fault['kind']} from {fault['at_s']:g} s on" for fault in told["faults"]]
    return "\n".join([*lines, f"look: insitu stalls {told['store']}"])
