"""What full steps cost: the running median of their times less that of quiet steps of the same shape.

Times are CPU time of the step's thread on the host, and time between two events on a device: what other processes do to
the machine is in neither. How much each step was asked for is its *burden*, in calibrated ns: of one shape, cost is
taken as proportional to it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from threading import get_ident
from time import monotonic_ns, thread_time_ns
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from insitu.session.step import StepRecord

KEPT: Final = 33
"""Times of each kind that are kept of a shape: the latest."""
ENOUGH: Final = 3
"""Steps of a kind without which it has no median: one of two may be the first of its shape, which is never typical."""
STALE_WINDOWS: Final = 64
"""Windows with steps of a shape and no quiet one, after which its quiet steps are forgotten: the machine, or what the
model does with that shape, may have become another."""

Shape = tuple[int | None, int]
"""Phase, and the number of bits of the number of valid rows."""


@dataclass(frozen=True, slots=True)
class Burden:
    """How much of one step is asked for, in calibrated ns."""

    expected: float = 0.0
    """On average, by the rules, had no period been lengthened."""
    governed: float = 0.0
    """Really taken of that."""
    named: float = 0.0
    """Taken for requests that asked by name."""

    def __add__(self, other: Burden) -> Burden:
        return Burden(self.expected + other.expected, self.governed + other.governed, self.named + other.named)


NOTHING: Final = Burden()


@dataclass(slots=True)
class _Times:
    """Steps of one shape."""

    quiet: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    slopes: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Of full steps: time beyond the quiet ones of then, for a unit of burden."""
    waiting: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT))
    """Time and burden of full steps that found no quiet ones to compare with."""
    expected: float = 0.0
    """Burden of the open window had no period been lengthened."""
    taken: float = 0.0
    """Burden that was taken, since the last look."""
    named: float = 0.0
    num_quiet: int = 0
    """In the open window."""
    num_governed: int = 0
    """Full steps of the open window that a longer period would have left quiet."""
    num_without: int = 0
    """Windows in a row with steps and no quiet one."""

    @property
    def quiet_ns(self) -> float | None:
        return median(self.quiet) if len(self.quiet) >= ENOUGH else None

    @property
    def slope(self) -> float | None:
        """Cost of a unit of burden; None where there is nothing to compare."""
        return max(0.0, median(self.slopes)) if len(self.slopes) >= ENOUGH else None

    def add(self, step_ns: float, burden: Burden) -> None:
        """Take in a step; one that took nothing is quiet."""
        self.expected += burden.expected
        self.named += burden.named
        if taken := burden.governed + burden.named:
            self.taken += taken
            self.waiting.append((step_ns, taken))
            self.num_governed += not burden.named
        else:
            self.num_quiet += 1
            self.quiet.append(step_ns)
        if self.waiting and (quiet := self.quiet_ns) is not None:
            self.slopes.extend((ns - quiet) / of for ns, of in self.waiting)
            self.waiting.clear()

    def end_window(self) -> None:
        self.num_without = self.num_without + 1 if self.expected and not self.num_quiet else 0
        if self.num_without >= STALE_WINDOWS:
            self.quiet.clear()
            self.slopes.clear()
        self.expected = self.named = 0.0
        self.num_quiet = self.num_governed = 0


class StepCosts:
    """Remembers the times of steps by shape. Used by the drain's thread alone."""

    def __init__(self) -> None:
        self._shapes: dict[Shape, _Times] = {}
        self.step_ns = 0.0
        """Of all steps since the last window."""
        self.taken_ns = 0.0
        """What full steps have cost so far, as well as was known when they ran."""

    def add(self, shape: Shape, step_ns: float, burden: Burden) -> None:
        """Take in a step."""
        times = self._shapes.setdefault(shape, _Times())
        self.step_ns += step_ns
        times.add(step_ns, burden)

    def look(self) -> None:
        """Add what full steps have cost since the last look to `taken_ns`."""
        slope = self._slopes()
        for shape, times in self._shapes.items():
            self.taken_ns += slope[shape] * times.taken
            times.taken = 0.0

    @property
    def is_blind(self) -> bool:
        """True where full steps ran with nothing to compare any of them with, and a longer period would help."""
        times = self._shapes.values()
        known = any(each.slope is not None for each in times)
        return not known and any(each.num_governed >= ENOUGH and not each.quiet for each in times)

    def close(self) -> tuple[float, float]:
        """End a window: return what full steps would have cost at the rules' periods, and what named rows did cost."""
        self.look()
        slope = self._slopes()
        full_ns = sum(slope[shape] * times.expected for shape, times in self._shapes.items())
        named_ns = sum(slope[shape] * times.named for shape, times in self._shapes.items())
        for times in self._shapes.values():
            times.end_window()
        self.step_ns = 0.0
        return full_ns, named_ns

    def _slopes(self) -> dict[Shape, float]:
        """Return the cost of a unit of burden, by shape.

        Where a shape has nothing to compare, it is that of all that have, in proportion to what a quiet step takes;
        where none has, a unit costs what was calibrated.
        """
        found = {shape: times.slope for shape, times in self._shapes.items()}
        ratios = [
            slope / quiet
            for shape, slope in found.items()
            if slope is not None and (quiet := self._shapes[shape].quiet_ns)
        ]
        ratio = median(ratios) if ratios else None
        known = median(slope for slope in found.values() if slope is not None) if ratios else 1.0
        slopes = {}
        for shape, slope in found.items():
            quiet = self._shapes[shape].quiet_ns
            other = known if ratio is None or quiet is None else ratio * quiet
            slopes[shape] = other if slope is None else slope
        return slopes


class HostClock:
    """Times steps on the host: CPU time of the thread, or wall time where a step moves from one thread to another."""

    def begin(self, record: StepRecord) -> None:
        record.mark = (get_ident(), thread_time_ns(), monotonic_ns())

    def end(self, record: StepRecord) -> None:
        if record.mark is None:
            return
        thread, cpu_ns, wall_ns = record.mark
        spent = thread_time_ns() - cpu_ns if thread == get_ident() else monotonic_ns() - wall_ns
        record.mark = spent

    def read(self, record: StepRecord) -> float | None:
        """Return the ns of a finished step, on the drain's thread; None where it has none."""
        return record.mark if isinstance(record.mark, int) else None


class DeviceClock:
    """Times steps between two events of the device's stream."""

    def __init__(self, device: str) -> None:
        """device: the model's, which need not be that of the thread."""
        self._device = device

    def begin(self, record: StepRecord) -> None:
        import torch

        record.mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        record.mark.record(torch.cuda.current_stream(self._device))

    def end(self, record: StepRecord) -> None:
        """Nothing: `record.ready` is recorded at the end of every step."""

    def read(self, record: StepRecord) -> float | None:
        """Return the ns of a step that is ready."""
        mark: Any = record.mark
        return None if mark is None or record.ready is None else 1e6 * mark.elapsed_time(record.ready)


def clock_of(device: str) -> HostClock | DeviceClock:
    """Return the clock for a model on such a device, as torch writes it."""
    return DeviceClock(device) if device.startswith("cuda") else HostClock()
