"""Perfetto's protobuf, read back by its own classes: what a viewer would take for granted holds."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto

from insitu.records import schema_of
from insitu.vocabulary import IntervalClass
from insitu_collector.export.command import export_trace
from insitu_collector.export.perfetto import FIRST_HOST_CLOCK, write_perfetto
from insitu_collector.export.trace import Counter as TraceCounter
from insitu_collector.export.trace import Process, Slice, Trace, Track
from insitu_collector.rows.selection import select
from insitu_collector.simulate import UNIX_MINUS_MONO_NS, Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store

SCENARIO = Scenario(seed=5, seconds=6.0, base_ms=(5.0, 6.0, 4.0), faults=(Fault("slow", 2.0, 1, ms=15.0),))


@dataclass(slots=True)
class Seen:
    """A slice, an instant or a count as a viewer would have it."""

    track: int
    t0: int
    t1: int
    name: str
    category: str
    args: dict[str, Any]
    depth: int
    value: int = 0


@dataclass(slots=True)
class Decoded:
    """A trace as a viewer would have it; reading one checks what a viewer takes for granted."""

    tracks: dict[int, Any] = field(default_factory=dict)
    slices: list[Seen] = field(default_factory=list)
    instants: list[Seen] = field(default_factory=list)
    counts: list[Seen] = field(default_factory=list)
    snapshots: list[dict[int, int]] = field(default_factory=list)
    sources: dict[int, Seen] = field(default_factory=dict)
    sinks: dict[int, tuple[int, Seen]] = field(default_factory=dict)
    """Flow -> when it ended, and in which slice."""

    def process_of(self, seen: Seen) -> str:
        return str(self.tracks[self.tracks[seen.track].parent_uuid].process.process_name)

    def track_name(self, seen: Seen) -> str:
        return str(self.tracks[seen.track].name)

    def of_ranks(self) -> list[Seen]:
        return [seen for seen in self.slices if self.track_name(seen) == "step thread"]


def decode(data: bytes) -> Decoded:
    found = Decoded()
    names: dict[str, dict[int, str]] = {"event_names": {}, "event_categories": {}, "debug_annotation_names": {}}
    inside: defaultdict[int, list[Seen]] = defaultdict(list)
    last: dict[int, int] = {}
    packets = proto.Trace.FromString(data).packet
    assert packets[0].sequence_flags == proto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
    assert packets[0].trace_packet_defaults.timestamp_clock_id == proto.BUILTIN_CLOCK_MONOTONIC
    for packet in packets[1:]:
        assert packet.sequence_flags == proto.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        assert packet.trusted_packet_sequence_id == packets[0].trusted_packet_sequence_id
        for kind, known in names.items():
            for entry in getattr(packet.interned_data, kind):
                assert entry.iid not in known and entry.name not in known.values()
                known[entry.iid] = entry.name
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in found.tracks, "a track is described once"
            assert not track.parent_uuid or track.parent_uuid in found.tracks
            found.tracks[track.uuid] = track
        elif packet.HasField("clock_snapshot"):
            found.snapshots.append({clock.clock_id: clock.timestamp for clock in packet.clock_snapshot.clocks})
        elif packet.HasField("track_event"):
            event = packet.track_event
            assert event.track_uuid in found.tracks
            assert last.get(event.track_uuid, 0) <= packet.timestamp, "time goes on along a track"
            last[event.track_uuid] = packet.timestamp
            take(found, packet, names, inside[event.track_uuid])
    assert not any(inside.values()), "every slice ends"
    assert found.sources.keys() == found.sinks.keys(), "every flow has a source and a sink"
    return found


def take(found: Decoded, packet: Any, names: dict[str, dict[int, str]], inside: list[Seen]) -> None:
    event, t = packet.track_event, packet.timestamp
    if event.type == proto.TrackEvent.TYPE_COUNTER:
        found.counts.append(Seen(event.track_uuid, t, t, "", "", {}, 0, event.counter_value))
        return
    if event.type == proto.TrackEvent.TYPE_SLICE_END:
        seen = inside.pop()
        seen.t1 = t
    else:
        args = {
            names["debug_annotation_names"][note.name_iid]: getattr(note, note.WhichOneof("value"))
            for note in event.debug_annotations
        }
        (category,) = event.category_iids
        name, of = names["event_names"][event.name_iid], names["event_categories"][category]
        seen = Seen(event.track_uuid, t, t, name, of, args, len(inside))
        if event.type == proto.TrackEvent.TYPE_SLICE_BEGIN:
            inside.append(seen)
            found.slices.append(seen)
        else:
            found.instants.append(seen)
    for flow in event.flow_ids:
        assert flow not in found.sources
        found.sources[flow] = seen
    for flow in event.terminating_flow_ids:
        assert flow not in found.sinks
        found.sinks[flow] = t, seen


def exported(tables: dict[str, pa.Table], folder: Path, **window: Any) -> Decoded:
    write_store(tables, str(folder / "store"))
    chosen = select(open_store(folder / "store"), **window)
    export_trace(chosen, "perfetto", folder / "trace.pftrace")
    return decode((folder / "trace.pftrace").read_bytes())


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return simulate(SCENARIO)


@pytest.fixture(scope="module")
def trace(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    return exported(tables, tmp_path_factory.mktemp("trace"))


def test_each_rank_is_a_process_and_each_interval_a_slice(tables: dict[str, pa.Table], trace: Decoded) -> None:
    processes = [track.process for track in trace.tracks.values() if track.HasField("process")]
    assert [each.process_name for each in processes] == [
        "driver",
        *(f"rank {n}, stage {n} - simulated" for n in range(3)),
    ]
    assert len({each.pid for each in processes}) == len(processes)
    drawn = Counter((trace.process_of(seen)[:6], seen.name, seen.t0, seen.t1) for seen in trace.of_ranks())
    stored = Counter(
        (f"rank {row['rank']}", IntervalClass(row["cls"]).name.lower(), row["t0_ns"], row["t1_ns"])
        for row in tables["intervals"].to_pylist()
    )
    still_open = {key: count for key, count in drawn.items() if "(open)" in key[1]}
    assert drawn - Counter(still_open) == stored
    assert all(seen.depth == 0 for seen in trace.of_ranks())


def test_a_slice_carries_what_the_interval_says(tables: dict[str, pa.Table], trace: Decoded) -> None:
    wait = next(s for s in trace.of_ranks() if s.name == "recv_wait" and trace.process_of(s).startswith("rank 1"))
    rows = tables["intervals"].filter(pc.field("t0_ns") == wait.t0).to_pylist()
    row = next(row for row in rows if row["rank"] == 1)
    assert wait.args == {"step": row["step_id"], "mb": row["mb"], "peer": "rank 0", "cpu_ns": 0}
    assert wait.category in ("wait_upstream", "no_demand")


def test_flows_go_from_the_send_of_a_step_to_its_receive_and_back(tables: dict[str, pa.Table], trace: Decoded) -> None:
    hops: Counter[tuple[str, str]] = Counter()
    for flow, source in trace.sources.items():
        t, sink = trace.sinks[flow]
        assert source.t0 <= t == sink.t1
        ranks = trace.process_of(source)[5], trace.process_of(sink)[5]
        hops[ranks] += 1
        if ranks == ("2", "0"):
            assert source.name == "sample"
            assert source.args["mb"] == sink.args["mb"] and source.args["step"] < sink.args["step"]
        else:
            assert (source.name, source.args["step"]) == ("send_xfer", sink.args["step"])
            assert sink.name in ("recv_wait", "recv_xfer")
            assert int(ranks[1]) == int(ranks[0]) + 1
    steps = tables["steps"].filter(pc.field("stage") == 0).to_pylist()
    assert (hops["0", "1"], hops["1", "2"]) == (len(steps), len(steps))
    slots: dict[int, set[str]] = {}
    goes_on = 0
    for row in steps:
        names = {entry["request"] for entry in row["rows"]}
        goes_on += bool(names & slots.get(row["mb"], set()))
        slots[row["mb"]] = names
    assert 0 < hops["2", "0"] == goes_on < len(steps)


def test_requests_lie_in_lanes_and_are_counted(tables: dict[str, pa.Table], trace: Decoded) -> None:
    within = [seen for seen in trace.slices if trace.track_name(seen) == "requests"]
    requests = [seen for seen in within if seen.depth == 0]
    assert {seen.name for seen in within if seen.depth == 1} == {"queue", "prefill", "decode"}
    arrived = {row["request"] for row in tables["requests"].to_pylist()}
    assert {seen.name for seen in requests} == arrived
    in_flight = {uuid for uuid, track in trace.tracks.items() if track.name == "requests in flight"}
    counts = [(seen.t0, seen.value) for seen in trace.counts if seen.track in in_flight]
    for t, value in counts[:: max(1, len(counts) // 20)]:
        assert value == sum(seen.t0 <= t < seen.t1 for seen in requests)
    assert any(track.name == "requests waiting" for track in trace.tracks.values())


def test_clocks_of_hosts_are_joined_and_moved_times_keep_their_own(
    tables: dict[str, pa.Table], trace: Decoded, tmp_path: Path
) -> None:
    shift = 123_456_789_000
    moved = two_hosts(tables, shift)
    found = exported(moved, tmp_path)
    assert [(s.name, s.t0, s.t1) for s in found.of_ranks()] == [(s.name, s.t0, s.t1) for s in trace.of_ranks()]
    assert len(found.sources) == len(trace.sources)
    for seen in found.of_ranks():
        raw = (seen.args.get("raw_t0_ns"), seen.args.get("raw_t1_ns"))
        is_other = found.process_of(seen).endswith("other")
        assert is_other == found.process_of(seen).startswith("rank 1")
        assert raw == ((seen.t0 + shift, seen.t1 + shift) if is_other else (None, None)) or "open" in seen.args
    assert len(found.snapshots) == 2
    for snapshot in found.snapshots:
        own = next(t for clock, t in snapshot.items() if clock >= FIRST_HOST_CLOCK)
        aligned, unix = snapshot[proto.BUILTIN_CLOCK_MONOTONIC], snapshot[proto.BUILTIN_CLOCK_REALTIME]
        assert unix - aligned == UNIX_MINUS_MONO_NS
        assert own - aligned in (0, shift)


def two_hosts(tables: dict[str, pa.Table], shift: int) -> dict[str, pa.Table]:
    """The same run with rank 1 on a host whose monotonic clock is `shift` ahead."""
    found = dict(tables)
    for name, columns in {
        "intervals": ("t0_ns", "t1_ns"),
        "steps": ("t0_ns",),
        "health": ("t_ns", "open_since_ns"),
    }.items():
        rows = [
            row | {c: row[c] + shift for c in columns if row["rank"] == 1 and row[c] is not None}
            for row in tables[name].to_pylist()
        ]
        found[name] = pa.Table.from_pylist(rows, schema=schema_of(name))
    sources = [
        row
        | (
            {
                "host": "other",
                "boot_id": "other",
                "mono_anchor_ns": shift + 7,
                "unix_anchor_ns": row["unix_anchor_ns"] + 7,
            }
            if row["rank"] == 1
            else {}
        )
        for row in tables["sources"].to_pylist()
    ]
    return found | {"sources": pa.Table.from_pylist(sources, schema=schema_of("sources"))}


def test_replicas_and_tensor_parallel_ranks_on_several_hosts_have_flows_of_their_own(tmp_path: Path) -> None:
    grid = Scenario(seed=2, seconds=1.5, replicas=2, tensor_parallel=2, hosts=2)
    tables = simulate(grid)
    found = exported(tables, tmp_path)
    names = [track.process.process_name for track in found.tracks.values() if track.HasField("process")]
    ranks = [name for name in names if "rank" in name]
    assert len(set(ranks)) == len(ranks) == 8
    assert all(name.startswith(("replica 0, ", "replica 1, ")) for name in ranks)
    assert len(found.snapshots) == len(set(tables["sources"]["boot_id"].to_pylist()))
    assert len(found.of_ranks()) == tables["intervals"].num_rows
    (unix_minus_mono,) = {
        each[proto.BUILTIN_CLOCK_REALTIME] - each[proto.BUILTIN_CLOCK_MONOTONIC] for each in found.snapshots
    }
    assert unix_minus_mono == UNIX_MINUS_MONO_NS
    ahead = {
        max(each.values()) and next(t for c, t in each.items() if c >= FIRST_HOST_CLOCK) for each in found.snapshots
    }
    assert len(ahead) == len(found.snapshots)
    labels = [t.process.process_labels[0] for t in found.tracks.values() if "rank" in t.process.process_name]
    assert len([label for label in labels if "clock ±" in label]) == 4, "ranks of the host that is not the first"
    assert found.sources
    for flow, source in found.sources.items():
        _, sink = found.sinks[flow]
        assert found.process_of(source)[:9] == found.process_of(sink)[:9], "flows stay in a replica"
        stages = [int(found.process_of(seen).partition("stage ")[2][0]) for seen in (source, sink)]
        assert stages in ([0, 1], [1, 0])


def test_moments_are_instants_of_the_process_that_told_them(tables: dict[str, pa.Table], trace: Decoded) -> None:
    told = [(trace.process_of(seen), seen.name, seen.t0) for seen in trace.instants if seen.category == "event"]
    stored = tables["events"].to_pylist()
    assert "warmup_end" in {row["kind"] for row in stored}
    named = [row["kind"] + (f": {row['text']}" if row["text"] else "") for row in stored]
    assert sorted(told) == sorted(("driver", name, row["t_ns"]) for name, row in zip(named, stored, strict=True))


def test_a_window_clips_what_reaches_out_of_it(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    ends = np.asarray(tables["intervals"]["t1_ns"])
    begin = int(ends.max()) - 2_000_000_000 + UNIX_MINUS_MONO_NS
    found = exported(tables, tmp_path, begin_unix_ns=begin, end_unix_ns=begin + 1_000_000_000)
    since, until = begin - UNIX_MINUS_MONO_NS, begin - UNIX_MINUS_MONO_NS + 1_000_000_000
    assert min(seen.t0 for seen in found.slices) == since
    assert max(seen.t1 for seen in found.slices) == until
    cut = [seen for seen in found.slices if "raw_t0_ns" in seen.args]
    assert cut and all(seen.args["raw_t0_ns"] < since or seen.args["raw_t1_ns"] > until for seen in cut)


def test_slices_inside_slices_end_inside_them() -> None:
    rows = [
        Slice(10, 50, "a", "x", {"n": 1.5}, (1,)),
        Slice(10, 20, "b", "x", {}),
        Slice(20, 20, "moment", "x", {}, (), (1,)),
        Slice(20, 50, "c", "x", {}),
        Slice(50, 60, "d", "x", {}),
    ]
    process = Process("p", "l", [Track("t", lambda: iter(rows))], [TraceCounter("n", [1, 2], [3, 4])])
    file = io.BytesIO()
    write_perfetto(Trace("5eed", [process], [], 5, 1, 0), file)
    found = decode(file.getvalue())
    assert [(s.name, s.t0, s.t1, s.depth) for s in found.slices] == [
        ("a", 10, 50, 0),
        ("b", 10, 20, 1),
        ("c", 20, 50, 1),
        ("d", 50, 60, 0),
    ]
    assert [(s.name, s.t0, s.depth) for s in found.instants] == [("moment", 20, 1)]
    assert [(s.t0, s.value) for s in found.counts] == [(1, 3), (2, 4)]
    assert found.slices[0].args == {"n": 1.5}
