"""The records of a simulated run: its tables, as `insitu.records` has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments import ShardWriter
from insitu.vocabulary import NO_RANK
from insitu_collector.simulate import BEGIN_NS, LAYERS, MS, SECOND, UNIX_MINUS_MONO_NS, Rank, Run, Scenario

RUN: Final = "5eed5eed5eed5eed"
DRIVER_EPOCH: Final = 900
DRIVER_CORES: Final = 0.1
HOST_CORES: Final = 2
_ROW_FIELDS: Final = ("request", "row", "count", "position", "phase", "sample_row")


def simulate(scenario: Scenario) -> dict[str, pa.Table]:
    """Return the tables that such a run would have left."""
    run = Run(scenario)
    run.run()
    return {
        "sources": _sources(run),
        "events": _table("events", run.events, NO_RANK),
        "sites": pa.concat_tables([_table("sites", sites_of(run, rank.stage), rank.stage) for rank in run.ranks]),
        "steps": pa.concat_tables([_table("steps", _steps_of(run, rank), rank.stage) for rank in run.ranks]),
        "intervals": pa.concat_tables([_intervals(rank) for rank in run.ranks]),
        "summaries": pa.concat_tables(
            [_table("summaries", _summaries(run, rank.stage), rank.stage) for rank in run.ranks]
        ),
        "health": pa.concat_tables([_table("health", rows, rank) for rank, rows in _health(run).items()]),
        "requests": _table(
            "requests", [{"request": name, "event": int(event), "t_ns": t} for name, event, t in run.requests], NO_RANK
        ),
    }


def _table(name: str, rows: Iterable[dict[str, Any]], rank: int) -> pa.Table:
    epoch = DRIVER_EPOCH if rank == NO_RANK else 1 + rank
    full = [{"epoch": epoch, "rank": rank, "stage": rank, "row_seq": place, **row} for place, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=schema_of(name))


def _sources(run: Run) -> pa.Table:
    known = run.scenario.param_bytes
    common = {
        "run": RUN,
        "host": "simulated",
        "boot_id": "simulated",
        "replica": 0,
        "unix_anchor_ns": UNIX_MINUS_MONO_NS,
        "mono_anchor_ns": 0,
    }
    found = [_table("sources", [{**common, "role": "driver"}], NO_RANK)]
    for rank in run.ranks:
        num_bytes = known[rank.stage] if known else None
        found.append(_table("sources", [{**common, "role": "rank", "param_bytes": num_bytes}], rank.stage))
    return pa.concat_tables(found)


def sites_of(run: Run, stage: int) -> list[dict[str, Any]]:
    """Return the sites of a stage in order of execution: per layer attention, MLP, residual; then the head."""
    names: list[tuple[str, int | None, str]] = [("embed", None, "tokens")] if stage == 0 else []
    for layer in range(stage * LAYERS, (stage + 1) * LAYERS):
        names += [(f"L{layer}.{part}", layer, "tokens") for part in ("attn_out", "mlp_out", "resid_post")]
    if stage == len(run.ranks) - 1:
        names += [("final_norm", None, "tokens"), ("logits", None, "samples")]
    return [{"site": n, "name": name, "layer": layer, "axis": axis} for n, (name, layer, axis) in enumerate(names)]


def _steps_of(run: Run, rank: Rank) -> list[dict[str, Any]]:
    rows = []
    for step in run.steps[: rank.num_steps]:
        entries = [dict(zip(_ROW_FIELDS, row, strict=True)) for row in step["rows"]]
        rows.append({**step, "num_padded": 0, "rows": entries if rank.stage == 0 else None})
    return rows


def _intervals(rank: Rank) -> pa.Table:
    columns = np.array(rank.intervals, np.int64).reshape(-1, 7)
    count = len(columns)
    arrays = dict(zip(("t0_ns", "t1_ns", "cls", "step_id", "mb", "peer", "cpu_ns"), columns.T, strict=True))
    arrays |= {"epoch": np.full(count, 1 + rank.stage), "rank": np.full(count, rank.stage)}
    arrays |= {"stage": np.full(count, rank.stage), "row_seq": np.arange(count), "bytes": np.zeros(count, np.int64)}
    schema = schema_of("intervals")
    return pa.Table.from_arrays([pa.array(arrays[f.name]).cast(f.type) for f in schema], schema=schema)


def _summaries(run: Run, stage: int) -> list[dict[str, Any]]:
    sites = sites_of(run, stage)
    flagged = {step: (at, layer, rows) for step, at, layer, rows in run.flagged if at <= stage}
    found: list[dict[str, Any]] = []
    boundary = [site for site in sites if site["name"] in ("logits", f"L{(stage + 1) * LAYERS - 1}.resid_post")]
    for step in run.steps[: run.ranks[stage].num_steps]:
        number = step["step_id"]
        if number not in flagged:
            found += [_summary(number, site, None) for site in boundary]
            continue
        at, layer, bad = flagged[number]
        name = f"L{at * LAYERS + layer}.mlp_out"
        first = next(site["site"] for site in sites if site["name"] == name) if at == stage else 0
        for site in sites:
            spoilt = site["site"] >= first
            found.append(_summary(number, site, bad if spoilt and site in boundary else None, spoilt=spoilt))
    return found


def _summary(step: int, site: dict[str, Any], bad: list[int] | None, *, spoilt: bool = False) -> dict[str, Any]:
    canary = float("nan") if spoilt else 1.5
    return {"step_id": step, "site": site["site"], "canary": canary, "absmax": 2.0, "nonfinite_rows": bad}


def _health(run: Run) -> dict[int, list[dict[str, Any]]]:
    """Return heartbeats by rank: each second, and five times a second while an interval is open for over one."""
    end = max(rank.free_ns for rank in run.ranks)
    random = np.random.default_rng(run.scenario.seed + 1)
    found: dict[int, list[dict[str, Any]]] = {NO_RANK: []}
    for t in range(BEGIN_NS, end, SECOND):
        cpu = int((t - BEGIN_NS) * DRIVER_CORES)
        found[NO_RANK].append({"t_ns": t, "cpu_ns": cpu, "run_delay_ns": 0, "closing": False} | _host(run, t))
    for rank in run.ranks:
        times = set(range(BEGIN_NS + int(random.integers(0, SECOND)), end, SECOND))
        for t0, t1, *_ in rank.intervals:
            if t1 - t0 > SECOND:
                times |= set(range(t0 + SECOND, t1, 200 * MS))
        found[rank.stage] = [_beat(run, rank, t) for t in sorted(times)]
    return found


def _beat(run: Run, rank: Rank, t_ns: int) -> dict[str, Any]:
    row: dict[str, Any] = {"t_ns": t_ns, "closing": False} | _host(run, t_ns)
    done = np.searchsorted([counter[0] for counter in rank.counters], t_ns) - 1
    _, cpu, delay, steps = rank.counters[done] if done >= 0 else (0, 0, 0, 0)
    row |= {"cpu_ns": cpu, "step_cpu_ns": cpu, "run_delay_ns": delay, "num_steps": steps}
    place = int(np.searchsorted([interval[0] for interval in rank.intervals], t_ns, side="right")) - 1
    if place >= 0 and rank.intervals[place][1] > t_ns:
        t0, _, cls, step, mb, peer, _ = rank.intervals[place]
        row |= {"open_cls": cls, "open_since_ns": t0, "open_step_id": step, "open_mb": mb, "open_peer": peer}
    return row


def _host(run: Run, t_ns: int) -> dict[str, Any]:
    busy = (t_ns - BEGIN_NS) * DRIVER_CORES
    for rank in run.ranks:
        done = np.searchsorted([counter[0] for counter in rank.counters], t_ns) - 1
        busy += rank.counters[done][1] if done >= 0 else 0
    for begin, end, cores in run.scenario.bursts:
        since, until = run.traffic_ns + int(begin * SECOND), run.traffic_ns + int(end * SECOND)
        busy += cores * max(0, min(t_ns, until) - since)
    return {"host_busy_ns": int(busy), "host_cores": HOST_CORES}


def write_store(tables: dict[str, pa.Table], path: str, *, seqs: dict[tuple[int, str], int] | None = None) -> None:
    """Write tables into a shard of the store at `path`; `seqs` carries batch numbers from one call to the next."""
    seqs = {} if seqs is None else seqs
    writer = ShardWriter(path, "simulated")
    try:
        for name, rows in tables.items():
            for epoch in rows["epoch"].unique().to_pylist():
                mine = rows.filter(pc.equal(rows["epoch"], pa.scalar(epoch, pa.uint64()))).combine_chunks()
                for batch in mine.to_batches():
                    seq = seqs.get((epoch, name), 0)
                    seqs[epoch, name] = seq + 1
                    writer.append(Batch(epoch, seq, batch, name))
    finally:
        writer.close()
