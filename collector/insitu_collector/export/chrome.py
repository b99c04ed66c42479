"""A trace as Chrome's JSON, for viewers that do not read Perfetto's protobuf. Written event by event."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from insitu_collector.export.trace import Counter, Process, Slice, Trace
from insitu_collector.rows.selection import as_time


def write_chrome(trace: Trace, file: IO[bytes]) -> None:
    """Write a trace to a binary file. Times are microseconds since `otherData.base_unix_ns`."""
    base = min((_first_ns(process) for process in trace.processes), default=0)
    clock = trace.clocks[0] if trace.clocks else None
    base_unix_ns = base + (clock.unix_ns - clock.t_ns if clock else 0)
    other = {"run": trace.run, "base_unix_ns": str(base_unix_ns), "base": as_time(base_unix_ns)}
    head = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(other)},"traceEvents":[\n'
    file.write(head.encode())
    for number, event in enumerate(_events(trace, base)):
        file.write((",\n" if number else "").encode() + json.dumps(event, separators=(",", ":")).encode())
    file.write(b"\n]}\n")


def _first_ns(process: Process) -> int:
    firsts = [each.t0_ns for track in process.tracks if (each := next(track.slices(), None)) is not None]
    firsts += [counter.t_ns[0] for counter in process.counters if counter.t_ns]
    return min(firsts, default=2**62)


def _events(trace: Trace, base: int) -> Iterator[dict[str, Any]]:
    for pid, process in enumerate(trace.processes, 1):
        yield _meta("process_name", pid, 0, name=process.name)
        yield _meta("process_labels", pid, 0, labels=process.label)
        yield _meta("process_sort_index", pid, 0, sort_index=pid)
        for counter in process.counters:
            yield from _counter(counter, pid, base)
        for tid, track in enumerate(process.tracks, 1):
            yield _meta("thread_name", pid, tid, name=track.name)
            for each in track.slices():
                yield from _slice(each, {"pid": pid, "tid": tid}, base)


def _meta(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _counter(counter: Counter, pid: int, base: int) -> Iterator[dict[str, Any]]:
    for t_ns, value in zip(counter.t_ns, counter.value, strict=True):
        yield {"ph": "C", "name": counter.name, "pid": pid, "ts": _us(t_ns - base), "args": {counter.name: value}}


def _slice(each: Slice, at: dict[str, int], base: int) -> Iterator[dict[str, Any]]:
    event = {"name": each.name, "cat": each.category, **at, "ts": _us(each.t0_ns - base), "args": each.args}
    if each.t1_ns > each.t0_ns:
        yield {"ph": "X", "dur": _us(each.t1_ns - each.t0_ns), **event}
    else:
        yield {"ph": "i", "s": "t", **event}
    flow = {"name": "hand over", "cat": "flow", **at}
    for number in each.flows_out:
        yield {"ph": "s", "id": number, "ts": event["ts"], **flow}
    inside = max(each.t0_ns, each.t1_ns - 1)
    for number in each.flows_in:
        yield {"ph": "f", "bp": "e", "id": number, "ts": _us(inside - base), **flow}


def _us(ns: int) -> float:
    return ns / 1e3
