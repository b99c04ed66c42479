"""The records of a simulated run: its tables, as `insitu.records` has them, in true time (`clocks` moves them)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.records import ROW_MAP, schema_of
from insitu.vocabulary import NO_RANK, IntervalClass, Phase, Role
from insitu_collector.simulate.clocks import Clocks
from insitu_collector.simulate.events import Replica, StageLog, Step
from insitu_collector.simulate.scenario import LAYERS, Place, Scenario

Int64 = NDArray[np.int64]
Columns = dict[str, Any]

RUN: Final = "5eed5eed5eed5eed"
DRIVER_EPOCH: Final = 900
DRIVER: Final = Place(NO_RANK, 0, NO_RANK, 0, 0)


def identified(name: str, place: Place, columns: Columns, num_rows: int) -> pa.Table:
    """Return a table of one process; a column is an array, or one value for every row; what is left out is null."""
    epoch = DRIVER_EPOCH if place.rank == NO_RANK else place.epoch
    given: Columns = {"epoch": epoch, "rank": place.rank, "stage": place.stage, "row_seq": np.arange(num_rows)}
    given |= columns
    schema = schema_of(name)
    arrays = [_array(given.get(field.name), field.type, num_rows) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType, num_rows: int) -> pa.Array:
    if values is None:
        return pa.nulls(num_rows, kind)
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    if isinstance(values, np.ndarray):
        return pa.array(values).cast(kind)
    if isinstance(values, list):
        return pa.array(values, kind)
    return pa.repeat(pa.scalar(values, kind), num_rows)


def sources(scenario: Scenario, clocks: Clocks) -> pa.Table:
    """Return who wrote: the driver, then each rank."""
    known, tables = scenario.param_bytes, []
    for place in [DRIVER, *map(scenario.place, range(scenario.num_ranks))]:
        is_rank = place.rank != NO_RANK
        columns: Columns = {
            "run": RUN,
            "role": str(Role.RANK if is_rank else Role.DRIVER),
            "host": clocks.host_name(place.host),
            "boot_id": clocks.host_name(place.host),
            "replica": place.replica,
            "unix_anchor_ns": clocks.unix_anchor_ns(place.host),
            "mono_anchor_ns": 0,
        }
        if is_rank:
            columns |= {"pp_rank": place.stage, "tp_rank": place.tp, "dp_rank": place.replica}
            columns["param_bytes"] = known[place.stage] if known else None
        tables.append(identified("sources", place, columns, 1))
    return pa.concat_tables(tables)


def sites_of(scenario: Scenario, stage: int) -> list[dict[str, Any]]:
    """Return the sites of a stage in order of execution: per layer attention, router, MLP, residual; then the head."""
    names: list[tuple[str, int | None, str]] = [("embed", None, "tokens")] if stage == 0 else []
    parts = ("attn_out", *("router_logits",) * bool(scenario.experts), "mlp_out", "resid_post")
    for layer in range(stage * LAYERS, (stage + 1) * LAYERS):
        names += [(f"L{layer}.{part}", layer, "tokens") for part in parts]
    if stage == scenario.stages - 1:
        names += [("final_norm", None, "tokens"), ("logits", None, "samples")]
    return [{"site": n, "name": name, "layer": layer, "axis": axis} for n, (name, layer, axis) in enumerate(names)]


def sites(scenario: Scenario, place: Place) -> pa.Table:
    """Return the `sites` of a rank."""
    found = sites_of(scenario, place.stage)
    return identified("sites", place, {name: [row[name] for row in found] for name in found[0]}, len(found))


def intervals(replica: Replica, log: StageLog, place: Place) -> pa.Table:
    """Return the `intervals` of a rank, by time."""
    t0, t1, cpu, step, slot = edges_of_rank(log, place.tp, replica.steps)
    cls = np.tile(np.array(log.classes, np.int64), len(log.edges))
    peer = _peers(replica.scenario, place)[cls]
    if place.stage == 0 and replica.idle:
        idle = np.array(replica.idle, np.int64)
        none = np.full(len(idle), -1)
        extra = (idle[:, 0], idle[:, 1], np.zeros_like(none), none, none, np.full_like(none, IntervalClass.IDLE), none)
        t0, t1, cpu, step, slot, cls, peer = (
            np.concatenate(pair) for pair in zip((t0, t1, cpu, step, slot, cls, peer), extra, strict=True)
        )
        order = np.argsort(t0, kind="stable")
        t0, t1, cpu, step, slot, cls, peer = (column[order] for column in (t0, t1, cpu, step, slot, cls, peer))
    keep = t1 > t0
    columns = {"t0_ns": t0[keep], "t1_ns": t1[keep]}
    columns |= {"cls": cls[keep], "step_id": step[keep], "mb": slot[keep], "peer": peer[keep], "cpu_ns": cpu[keep]}
    return identified("intervals", place, columns | {"bytes": 0}, int(keep.sum()))


def edges_of_rank(log: StageLog, tp: int, steps: list[Step]) -> tuple[Int64, Int64, Int64, Int64, Int64]:
    """Return (begin, end, time on core, step, slot) of each possible interval of a rank, also of those of no length."""
    num_classes = len(log.classes)
    edges, cpu = log.stacked_edges[:, :, tp], log.stacked_cpu[:, :, tp].reshape(-1)
    number = np.array([step.number for step in steps[: len(edges)]], np.int64)
    slot = np.array([step.slot for step in steps[: len(edges)]], np.int64)
    per_step = np.repeat(number, num_classes), np.repeat(slot, num_classes)
    return edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1), cpu, *per_step


def _peers(scenario: Scenario, place: Place) -> Int64:
    """Return whom a rank names in an interval of each class."""
    found = np.full(len(IntervalClass), NO_RANK, np.int64)
    if scenario.stages == 1:
        return found
    before, after = (place.stage - 1) % scenario.stages, (place.stage + 1) % scenario.stages
    found[IntervalClass.RECV_WAIT] = scenario.rank(place.replica, before, place.tp)
    found[IntervalClass.RECV_XFER] = found[IntervalClass.RECV_WAIT]
    found[IntervalClass.SEND_XFER] = scenario.rank(place.replica, after, place.tp)
    return found


def steps(replica: Replica, log: StageLog, place: Place) -> pa.Table:
    """Return the `steps` of a rank; the first rank of the first stage says whose rows they were."""
    known = replica.steps[: len(log.edges)]
    begin = log.stacked_edges[:, 1, place.tp]
    columns: Columns = {
        "step_id": np.array([step.number for step in known], np.int64),
        "mb": np.array([step.slot for step in known], np.int64),
        "phase": np.array([_phase(step) for step in known], np.int64),
        "t0_ns": begin,
        "num_rows": np.array([step.shape.num_rows for step in known], np.int64),
        "num_padded": 0,
        "rows": row_maps(known) if place.stage == 0 and place.tp == 0 else None,
    }
    return identified("steps", place, columns, len(known))


def _phase(step: Step) -> int:
    phases = {entry.phase for entry in step.rows}
    return int(Phase.MIXED) if len(phases) > 1 else phases.pop()


def row_maps(known: list[Step]) -> pa.Array:
    """Return the row maps of steps as one array."""
    offsets = np.concatenate([[0], np.cumsum([len(step.rows) for step in known])]).astype(np.int32)
    flat = [entry for step in known for entry in step.rows]
    columns = list(zip(*flat, strict=True)) or [()] * ROW_MAP.value_type.num_fields
    fields = list(ROW_MAP.value_type)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, fields, strict=True)]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(arrays, fields=fields), type=ROW_MAP)


def requests(replicas: Iterable[Replica]) -> pa.Table:
    """Return the `requests` of all replicas, by time."""
    rows = sorted((row for replica in replicas for row in replica.requests), key=lambda row: row.t_ns)
    names, events, times, numbers, tokens = zip(*rows, strict=True) if rows else ((),) * 5
    columns: Columns = {"request": list(names), "event": list(events), "num_tokens": list(tokens)}
    columns |= {"t_ns": list(times), "step_id": list(numbers)}
    return identified("requests", DRIVER, columns, len(rows))
