"""A trace as Perfetto's protobuf, packet by packet. Needs the package `perfetto` (extra `perfetto`)."""

from __future__ import annotations

import hashlib
from typing import IO, Any, Final

from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto
from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

from insitu_collector.export.trace import Args, Counter, Process, Slice, Trace, Track

SEQUENCE: Final = 1
FIRST_HOST_CLOCK: Final = 128
"""Clock ids from here on belong to whoever writes the trace: one a host, its CLOCK_MONOTONIC."""
_CLEARED: Final = proto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
_NEEDED: Final = proto.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
_BEGIN: Final = proto.TrackEvent.TYPE_SLICE_BEGIN
_END: Final = proto.TrackEvent.TYPE_SLICE_END
_INSTANT: Final = proto.TrackEvent.TYPE_INSTANT


def write_perfetto(trace: Trace, file: IO[bytes]) -> None:
    """Write a trace to a binary file."""
    _Writer(file, trace.run).write(trace)


class _Names:
    """Names that are written once and then meant by number."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, int] = {}

    def number(self, name: str, packet: Any) -> int:
        """Return the number of a name; a name that is new is told in this packet."""
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = len(self._known) + 1
            entry = getattr(packet.interned_data, self.kind).add()
            entry.iid, entry.name = found, name
        return found


class _Writer:
    def __init__(self, file: IO[bytes], run: str) -> None:
        self._builder = StreamingTraceProtoBuilder(file)
        self._run = run
        self._flows = _uuid(run) >> 32 << 32
        """Added to the number of a flow, so that traces of two runs can be merged."""
        self._events, self._categories = _Names("event_names"), _Names("event_categories")
        self._args = _Names("debug_annotation_names")

    def write(self, trace: Trace) -> None:
        self._begin()
        self._clocks(trace)
        for place, process in enumerate(trace.processes):
            self._process(place, process)

    def _packet(self) -> Any:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = SEQUENCE
        packet.sequence_flags = _NEEDED
        return packet

    def _begin(self) -> None:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = SEQUENCE
        packet.sequence_flags = _CLEARED
        packet.first_packet_on_sequence = True
        packet.trace_packet_defaults.timestamp_clock_id = proto.BUILTIN_CLOCK_MONOTONIC
        self._builder.write_packet(packet)

    def _clocks(self, trace: Trace) -> None:
        for place, host in enumerate(trace.clocks):
            packet = self._packet()
            snapshot = packet.clock_snapshot
            snapshot.primary_trace_clock = proto.BUILTIN_CLOCK_MONOTONIC
            for number, t_ns in (
                (proto.BUILTIN_CLOCK_MONOTONIC, host.t_ns),
                (proto.BUILTIN_CLOCK_REALTIME, host.unix_ns),
                (FIRST_HOST_CLOCK + place, host.host_ns),
            ):
                snapshot.clocks.add(clock_id=number, timestamp=t_ns)
            self._builder.write_packet(packet)

    def _process(self, place: int, process: Process) -> None:
        uuid = _uuid(self._run, place)
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid = uuid
        track.process.pid = place + 1
        track.process.process_name = process.name
        track.process.process_labels.append(process.label)
        track.process.legacy_sort_index = place
        track.child_ordering = proto.TrackDescriptor.EXPLICIT
        self._builder.write_packet(packet)
        for number, counter in enumerate(process.counters):
            self._counter(counter, uuid, number)
        for number, track in enumerate(process.tracks, len(process.counters)):
            self._track(track, uuid, number)

    def _describe(self, name: str, parent: int, number: int) -> Any:
        packet = self._packet()
        track = packet.track_descriptor
        track.uuid = _uuid(self._run, parent, number)
        track.parent_uuid = parent
        track.name = name
        track.sibling_order_rank = number
        return packet

    def _counter(self, counter: Counter, parent: int, number: int) -> None:
        packet = self._describe(counter.name, parent, number)
        uuid = packet.track_descriptor.uuid
        packet.track_descriptor.counter.unit = proto.CounterDescriptor.UNIT_COUNT
        self._builder.write_packet(packet)
        for t_ns, value in zip(counter.t_ns, counter.value, strict=True):
            packet = self._packet()
            packet.timestamp = t_ns
            packet.track_event.type = proto.TrackEvent.TYPE_COUNTER
            packet.track_event.track_uuid = uuid
            packet.track_event.counter_value = value
            self._builder.write_packet(packet)

    def _track(self, track: Track, parent: int, number: int) -> None:
        packet = self._describe(track.name, parent, number)
        uuid = packet.track_descriptor.uuid
        self._builder.write_packet(packet)
        inside: list[Slice] = []
        for each in track.slices():
            while inside and inside[-1].t1_ns <= each.t0_ns:
                self._end(inside.pop(), uuid)
            if each.t1_ns > each.t0_ns:
                self._write_event(each, uuid, _BEGIN)
                inside.append(each)
            else:
                self._write_event(each, uuid, _INSTANT)
        while inside:
            self._end(inside.pop(), uuid)

    def _write_event(self, each: Slice, uuid: int, kind: int) -> None:
        packet = self._packet()
        packet.timestamp = each.t0_ns
        event = packet.track_event
        event.type, event.track_uuid = kind, uuid
        event.name_iid = self._events.number(each.name, packet)
        event.category_iids.append(self._categories.number(each.category, packet))
        self._annotate(each.args, packet)
        if each.flows_out:
            event.flow_ids.extend(self._flows + flow for flow in each.flows_out)
        if each.flows_in and kind == _INSTANT:
            event.terminating_flow_ids.extend(self._flows + flow for flow in each.flows_in)
        self._builder.write_packet(packet)

    def _end(self, each: Slice, uuid: int) -> None:
        """A flow ends at the end of what received it: a receive begins before the send it waits for."""
        packet = self._packet()
        packet.timestamp = each.t1_ns
        event = packet.track_event
        event.type, event.track_uuid = _END, uuid
        if each.flows_in:
            event.terminating_flow_ids.extend(self._flows + flow for flow in each.flows_in)
        self._builder.write_packet(packet)

    def _annotate(self, args: Args, packet: Any) -> None:
        for name, value in args.items():
            annotation = packet.track_event.debug_annotations.add()
            annotation.name_iid = self._args.number(name, packet)
            if isinstance(value, str):
                annotation.string_value = value
            elif isinstance(value, int):
                annotation.int_value = value
            else:
                annotation.double_value = value


def _uuid(*of: object) -> int:
    """Return a 64-bit number that is the same for the same thing and, but for a chance of 2**-64, no other's."""
    digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") | 1
