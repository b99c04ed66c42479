"""What `make bench-collector` has measured, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from collector_results import MIB, FramesResult, RecoveryResult, SpansResult


def frame_lines(result: FramesResult) -> Iterator[str]:
    """Yield how fast frames become durable."""
    rounds = result.ratios[0].num_pairs
    yield f"frames of {result.frame_bytes / MIB:.2f} MiB, {result.num_bytes / MIB:.0f} MiB in {rounds} rounds"
    for way, rate in result.mib_per_s.items():
        yield f"  {way:24} {rate:8.1f} MiB/s"
    for ratio in result.ratios:
        told = result.targets.get(ratio.name, "")
        yield f"  {ratio.name:24} {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of raw{told and '  ' + told}"
    for level, found in (("RECEIVED", result.received), ("DURABLE", result.durable)):
        yield f"  acknowledged {level:11} p50 {found.p50_ms:.1f} ms, p99 {found.p99_ms:.1f} ms"
    used = ", ".join(f"{who} {ms:.2f}" for who, ms in result.cpu_ms_per_mib.items())
    yield f"  CPU, ms a MiB            {used}"
    yield (
        f"  memory of the collector  {result.half_mib:.0f} MiB half way, {result.end_mib:.0f} at the end,"
        f" {result.peak_mib:.0f} at most  {result.targets['memory']}"
    )
    yield f"  read again               {result.num_found} of {result.num_rows} rows"
    yield _others(result.foreign_share)


def recovery_lines(result: RecoveryResult) -> Iterator[str]:
    """Yield what a kill costs."""
    mib = [num_bytes / MIB for num_bytes in result.num_bytes]
    yield f"killed {len(mib)} times amid frames, {np.median(mib):.0f} MiB in open files"
    for what, seconds in (
        ("reading and crc32", result.read_s),
        ("a start on nothing", result.start_s),
        ("a start on what was left", result.ready_s),
    ):
        yield f"  {what:24} {np.median(seconds):.3f} s [{min(seconds):.3f}, {max(seconds):.3f}]"
    ratio = result.ratio
    yield (
        f"  recovery, less the start {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] of reading"
        f"  {result.targets['recovery']}"
    )
    yield (
        f"  rows                     {result.num_acknowledged} acknowledged as durable, {result.num_lost} of them lost,"
        f" {result.num_twice} stored twice"
    )
    yield _others(result.foreign_share)


def span_lines(results: Sequence[SpansResult], targets: dict[str, str]) -> Iterator[str]:
    """Yield how fast spans become durable."""
    yield f"spans by OTLP/gRPC, {results[0].spans_per_request} a request, durable"
    for result in results:
        if result.unable:
            yield f"  {result.receiver:24} could not run: {result.unable}"
            continue
        used = ", ".join(f"{who} {us:.1f}" for who, us in result.cpu_us_per_span.items())
        told = targets.get(result.receiver, "")
        yield (
            f"  {result.receiver:24} {result.spans_per_s:9.0f} spans/s; CPU, us a span: {used};"
            f" {result.num_found} of {result.num_spans} found{told and '  ' + told}"
        )
        yield _others(result.foreign_share)


def _others(share: float) -> str:
    return f"  other processes took {share:.1%} of the cores"
