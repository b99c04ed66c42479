"""What `make bench-collector` has measured, and what that says of the targets. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from overhead_figures import Ratio, Target, noise

MIB: Final = 1 << 20
OF_RAW: Final = 0.8
"""Frames made durable, over what the disk takes; and recovery, over reading the same files."""
SPANS_A_SECOND: Final = 150_000.0
FLAT: Final = 1.1
"""Resident memory at the end over that after half of the rounds, at most: until then caches fill."""


@dataclass(frozen=True)
class Percentiles:
    """Of a time, in ms."""

    p50_ms: float
    p99_ms: float


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """Return them. Raises ValueError for no values."""
    if not seconds:
        raise ValueError("there are no times")
    return Percentiles(*(float(value) * 1e3 for value in np.percentile(np.asarray(seconds), [50, 99])))


@dataclass(frozen=True)
class FramesResult:
    """Frames of 1 MiB until they are durable, in turns with a bare write of as many bytes to the same disk."""

    num_bytes: int
    """Of all rounds together."""
    frame_bytes: int
    mib_per_s: Mapping[str, float]
    """Way -> median of its rounds."""
    ratios: list[Ratio]
    """Raw seconds over those of each way: its rate, against that of raw."""
    received: Percentiles
    durable: Percentiles
    cpu_ms_per_mib: Mapping[str, float]
    """Process -> CPU-ms a MiB."""
    half_mib: float
    end_mib: float
    peak_mib: float
    """Resident memory of the collector: after half of the rounds, at the end, the most there ever was."""
    num_rows: int
    num_found: int
    """Rows sent, and different rows found by reading the store again."""
    foreign_share: float

    @property
    def is_right(self) -> bool:
        return self.num_rows == self.num_found

    @property
    def noise(self) -> list[str]:
        return noise(self.ratios, self.foreign_share)

    @property
    def targets(self) -> dict[str, str]:
        ours = next(ratio for ratio in self.ratios if ratio.name == "frames")
        speed = "too noisy" if self.noise else Target(OF_RAW, at_least=True).verdict(ours)
        flat = "met" if self.end_mib <= FLAT * self.half_mib else "missed"
        return {"frames": f"target >= {OF_RAW}: {speed}", "memory": f"target: flat, <= {FLAT} of half way: {flat}"}


@dataclass(frozen=True)
class RecoveryResult:
    """A collector killed amid frames, and started again on what it left."""

    num_bytes: list[int]
    """Of open files, by round."""
    read_s: list[float]
    """Reading them again and computing their checksums."""
    start_s: list[float]
    """A start of the collector on a store without anything to recover, until it is ready."""
    ready_s: list[float]
    """A start on the store of the killed one."""
    num_acknowledged: int
    """Rows acknowledged as durable before the kill, all rounds together."""
    num_lost: int
    """Those of them that are not in the store."""
    num_twice: int
    """Rows that a reader returns twice."""
    ratio: Ratio
    """Seconds of reading over what recovery adds to a start: its rate, against that of reading."""
    foreign_share: float

    @property
    def is_right(self) -> bool:
        return not self.num_lost and not self.num_twice

    @property
    def noise(self) -> list[str]:
        return noise([self.ratio], self.foreign_share)

    @property
    def targets(self) -> dict[str, str]:
        # A ratio far from 1 varies more: what is below the target as a whole has missed it, however wide.
        answer = "missed" if self.ratio.high < OF_RAW else Target(OF_RAW, at_least=True).verdict(self.ratio)
        if noise([], self.foreign_share):
            answer = "too noisy"
        return {"recovery": f"target >= {OF_RAW}: {answer}"}


@dataclass(frozen=True)
class SpansResult:
    """Spans sent by OTLP until they are durable, to one receiver."""

    receiver: str
    spans_per_request: int
    num_spans: int
    seconds: float = 0.0
    num_found: int = 0
    """Spans that are in its store afterwards."""
    cpu_us_per_span: Mapping[str, float] = field(default_factory=dict)
    """Process -> CPU-us a span."""
    foreign_share: float = 0.0
    unable: str = ""
    """Why it could not run; all else is nothing then."""

    @property
    def spans_per_s(self) -> float:
        return self.num_spans / self.seconds if self.seconds else 0.0

    @property
    def is_right(self) -> bool:
        return bool(self.unable) or self.num_found == self.num_spans

    @property
    def noise(self) -> list[str]:
        return [f"{self.receiver}: {reason}" for reason in noise([], self.foreign_share)]


def spans_targets(results: Sequence[SpansResult], ours: str) -> dict[str, str]:
    """Return what the target of spans came to."""
    found = next((result for result in results if result.receiver == ours and not result.unable), None)
    if found is None:
        return {}
    answer = "met" if found.spans_per_s >= SPANS_A_SECOND else "missed"
    if found.noise:
        answer = "too noisy"
    return {ours: f"target >= {SPANS_A_SECOND / 1e3:.0f}k spans/s: {answer}"}
