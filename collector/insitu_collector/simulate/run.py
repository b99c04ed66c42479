"""A whole simulated run, rank by rank, and a store made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.exporters.base import Batch
from insitu.segments.shard import ShardWriter
from insitu_collector.simulate import rows
from insitu_collector.simulate.clocks import Clocks
from insitu_collector.simulate.events import Replica
from insitu_collector.simulate.experts import expert_loads
from insitu_collector.simulate.health import Hosts, driver_health, rank_health
from insitu_collector.simulate.losses import without_lost
from insitu_collector.simulate.rows import DRIVER, identified
from insitu_collector.simulate.scenario import Place, Scenario
from insitu_collector.simulate.summaries import never_fired, summaries
from insitu_collector.simulate.work import FormulaService, Service

Tables = dict[str, pa.Table]

BLOCK_TOKENS: Final = 16
ENOUGH_TOKENS: Final = 65_536
"""Token positions that key/value memory has room for where it is never short."""


def simulate(scenario: Scenario, service: Service | None = None) -> Tables:
    """Return the tables that such a run would have left; service: where its times come from (None: the scenario)."""
    parts: dict[str, list[pa.Table]] = {}
    for tables in processes(scenario, service):
        for name, table in tables.items():
            parts.setdefault(name, []).append(table)
    return {name: pa.concat_tables(found) for name, found in parts.items()}


def processes(scenario: Scenario, service: Service | None = None) -> Iterator[Tables]:
    """Yield the tables of one process after another, the driver's last; `sources` of all come first."""
    service = service or FormulaService(scenario)
    replicas = [Replica(scenario, number, service) for number in range(scenario.replicas)]
    traffic_ns = max([replica.warm_up() for replica in replicas])
    for replica in replicas:
        replica.serve(traffic_ns)
    end_ns = max(int(log.free_ns.max()) for replica in replicas for log in replica.stages)
    clocks, hosts = Clocks(scenario, traffic_ns), Hosts(scenario, replicas)
    yield {"sources": rows.sources(scenario, clocks), "events": _events(scenario, traffic_ns)}
    compared: set[int] = set()
    """Hosts whose clock some process has compared with the first host's."""
    for place in map(scenario.place, range(scenario.num_ranks)):
        tables = _of_rank(replicas[place.replica], place, hosts, end_ns)
        if place.host not in compared:
            compared.add(place.host)
            exchanges = clocks.exchanges(place.host, end_ns, scenario.seed)
            tables["clocks"] = identified("clocks", place, exchanges, len(exchanges["t_ns"]))
        yield {name: clocks.shown(table, place.host) for name, table in tables.items() if table.num_rows}
    driver = {"health": driver_health(hosts, end_ns), "requests": rows.requests(replicas)}
    yield {name: clocks.shown(table, DRIVER.host) for name, table in driver.items()}


def _events(scenario: Scenario, traffic_ns: int) -> pa.Table:
    """Return what the driver says at the end of warm-up: the memory it hands out, and that traffic begins."""
    small = [int(fault.size) for fault in scenario.faults if fault.kind == "kv_small"]
    num_blocks = min(small, default=ENOUGH_TOKENS) // BLOCK_TOKENS
    text = [f"{num_blocks} blocks of {BLOCK_TOKENS} token positions", ""]
    told: dict[str, Any] = {"t_ns": traffic_ns, "kind": ["kv_pool", "warmup_end"], "step_id": -1, "text": text}
    if not scenario.warmup_steps:
        told |= {"kind": ["kv_pool"], "text": text[:1]}
    return identified("events", DRIVER, told, len(told["kind"]))


def _of_rank(replica: Replica, place: Place, hosts: Hosts, end_ns: int) -> Tables:
    log = replica.stages[place.stage]
    recorded = rows.intervals(replica, log, place)
    beats = rank_health(replica, place, recorded, hosts, end_ns)
    intervals, health = without_lost(replica.scenario, place, recorded, beats, replica.traffic_ns)
    told = never_fired(replica.scenario, place)
    events = {"events": told} if told.num_rows else {}
    return events | {
        "sites": rows.sites(replica.scenario, place),
        "steps": rows.steps(replica, log, place),
        "intervals": intervals,
        "summaries": summaries(replica, place),
        "expert_loads": expert_loads(replica, place),
        "health": health,
    }


def write_store(tables: Mapping[str, pa.Table], path: str, *, seqs: dict[tuple[int, str], int] | None = None) -> None:
    """Write tables into a shard of the store at `path`; `seqs` carries batch numbers from one call to the next."""
    writer = ShardWriter(path, "simulated")
    try:
        append(writer, tables, {} if seqs is None else seqs)
    finally:
        writer.close()


def append(writer: ShardWriter, tables: Mapping[str, pa.Table], seqs: dict[tuple[int, str], int]) -> None:
    """Append tables to a shard, each process's rows in batches of its own."""
    for name, table in tables.items():
        epochs = table["epoch"].unique().to_pylist()
        for epoch in epochs:
            mine = table if len(epochs) == 1 else table.filter(pc.equal(table["epoch"], pa.scalar(epoch, pa.uint64())))
            for batch in mine.combine_chunks().to_batches():
                seq = seqs.get((epoch, name), 0)
                seqs[epoch, name] = seq + 1
                writer.append(Batch(epoch, seq, batch, name))
