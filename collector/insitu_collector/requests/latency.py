"""What requests felt: time to first token, time between tokens, and how many came, a second at a time. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import Int64, Timeline, numbers
from insitu_collector.rows.row_maps import WARMUP_PREFIX

Float64 = NDArray[np.float64]

SECOND_NS: Final = 1_000_000_000
KEEP_S: Final = 3600
KEEP_SAMPLES_S: Final = 120
"""Single samples are kept this long; of older seconds the percentiles."""
MOST_RUNNING: Final = 100_000
_ENDS: Final = (RequestEvent.FINISHED, RequestEvent.FAILED)
_TOKENS: Final = (RequestEvent.FIRST_TOKEN, RequestEvent.TOKEN)


@dataclass(slots=True)
class Second:
    """Samples of one second, in seconds; a sample belongs to the second it ended in."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_finished: int = 0
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class Percentiles:
    """None: nothing was sampled. Times in seconds."""

    ttft_p50_s: float | None = None
    ttft_p95_s: float | None = None
    itl_p50_s: float | None = None
    itl_p99_s: float | None = None


def percentiles(seconds: Iterable[Second]) -> Percentiles:
    """Return the percentiles over all samples of some seconds (never a mean of percentiles)."""
    ttft = [value for second in seconds for value in second.ttft_s]
    itl = [value for second in seconds for value in second.itl_s]
    return Percentiles(*_quantiles(ttft, 50, 95), *_quantiles(itl, 50, 99))


def _quantiles(samples: list[float], *percents: int) -> list[float | None]:
    return [float(value) for value in np.percentile(samples, percents)] if samples else [None] * len(percents)


@dataclass(frozen=True, slots=True)
class Samples:
    """One kind of latency: when each sample ended, int64[n] on a timeline, and how long it took, float64[n]."""

    t_ns: Int64
    seconds: Float64


def samples_of(rows: pa.Table, clock: Timeline) -> tuple[Float64, Float64, int]:
    """Return all times to first token, all times between tokens, in seconds, and the number of tokens.

    rows: as of `timed_samples`.
    """
    first, between, num_tokens = timed_samples(rows, clock)
    return first.seconds, between.seconds, num_tokens


def timed_samples(rows: pa.Table, clock: Timeline) -> tuple[Samples, Samples, int]:
    """Return the samples of time to first token and of time between tokens, and the number of tokens.

    rows: of `requests`, in any order; warm-up requests and events of unknown numbers are left out.
    """
    request = rows["request"].combine_chunks().dictionary_encode()
    names = request.dictionary.to_pylist()
    warmup = np.array([name is None or name.startswith(WARMUP_PREFIX) for name in names], bool)
    code = np.asarray(request.indices.fill_null(-1)).astype(np.int64)
    event, t_ns = numbers(rows, "event", -1), clock.moved(rows, "t_ns")
    is_token = np.isin(event, _TOKENS)
    kept = (code >= 0) & (is_token | (event == RequestEvent.ARRIVED))
    kept[kept] = ~warmup[code[kept]]
    order = np.lexsort((t_ns[kept], code[kept]))
    code, event, t_ns, is_token = (column[kept][order] for column in (code, event, t_ns, is_token))
    follows = (code[1:] == code[:-1]) & is_token[1:]
    gaps = np.diff(t_ns) / 1e9
    arrived = event[:-1] == RequestEvent.ARRIVED
    first = follows & arrived & (event[1:] == RequestEvent.FIRST_TOKEN)
    between = follows & ~arrived
    return Samples(t_ns[1:][first], gaps[first]), Samples(t_ns[1:][between], gaps[between]), int(is_token.sum())


class Latency:
    """Follows the `requests` table of one run; warm-up requests are left out."""

    def __init__(self) -> None:
        self.seconds: dict[int, Second] = {}
        """Whole second of the timeline -> its samples, of the last `KEEP_SAMPLES_S`."""
        self.done: dict[int, tuple[Percentiles, int]] = {}
        """Older seconds -> their percentiles and tokens."""
        self._arrived: dict[str, int] = {}
        self._last_token: dict[str, int] = {}

    @property
    def num_running(self) -> int:
        """Return how many requests arrived and have not ended."""
        return len(self._arrived)

    def add(self, rows: pa.Table, clock: Timeline) -> None:
        """Take in new rows of `requests`; of one request they come in order."""
        columns = (rows["request"].to_pylist(), rows["event"].to_pylist(), clock.moved(rows, "t_ns").tolist())
        for request, event, t_ns in zip(*columns, strict=True):
            if not request.startswith(WARMUP_PREFIX):
                self._take(request, RequestEvent(event), t_ns)
        self._forget()

    def _take(self, request: str, event: RequestEvent, t_ns: int) -> None:
        if event == RequestEvent.ARRIVED and len(self._arrived) < MOST_RUNNING:
            self._arrived[request] = t_ns
        elif event in _TOKENS:
            second = self._second(t_ns)
            second.num_tokens += 1
            arrived, before = self._arrived.get(request), self._last_token.get(request)
            if event == RequestEvent.FIRST_TOKEN and arrived is not None:
                second.ttft_s.append((t_ns - arrived) / 1e9)
            elif before is not None:
                second.itl_s.append((t_ns - before) / 1e9)
            if arrived is not None:
                self._last_token[request] = t_ns
        elif event in _ENDS:
            self._arrived.pop(request, None)
            self._last_token.pop(request, None)
            second = self._second(t_ns)
            second.num_finished += event == RequestEvent.FINISHED
            second.num_failed += event == RequestEvent.FAILED

    def _second(self, t_ns: int) -> Second:
        return self.seconds.setdefault(t_ns // SECOND_NS, Second())

    def _forget(self) -> None:
        newest = max(self.seconds, default=0)
        for number in [n for n in self.seconds if n < newest - KEEP_SAMPLES_S]:
            second = self.seconds.pop(number)
            self.done[number] = percentiles([second]), second.num_tokens
        for number in [n for n in self.done if n < newest - KEEP_S]:
            del self.done[number]

    def at(self, number: int) -> tuple[Percentiles, int] | None:
        """Return the percentiles and the tokens of one second, or None when no request did anything in it."""
        second = self.seconds.get(number)
        return self.done.get(number) if second is None else (percentiles([second]), second.num_tokens)
