"""The session that does nothing: a different object instead of a branch at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from insitu.rules.rule import Rule, Standing
from insitu.session.accounts import Coverage, FlushReport, Stats
from insitu.session.intervals import Interval, Recorder
from insitu.session.live import Session
from insitu.session.open_step import Step
from insitu.session.row_map import Rows
from insitu.session.step import StepRecord

if TYPE_CHECKING:
    import torch

    from insitu.session.collecting import Collected
    from insitu.sites.site import Site


class _SilentInterval(Interval):
    def __enter__(self) -> Interval:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def turn(self, cls: str, at_ns: int | None = None, *, peer: int | None = None, num_bytes: int = 0) -> None:
        return None


class _SilentStep(Step):
    def __init__(self, step_id: int) -> None:
        self.record = StepRecord(step_id, 0, None, 0, None, None, 0, 0)
        self.is_observed = False

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class SilentSession(Session):
    """No thread, no hook, no record; every method of a session, at the cost of a call."""

    def __init__(self) -> None:
        self._interval = _SilentInterval(Recorder(capacity=1), 0, -1, -1, -1, 0)
        self._next_step = 0
        self.has_all_logits = False

    def step(
        self,
        step_id: int | None = None,
        *,
        mb: int = 0,
        phase: str | None = None,
        rows: Sequence[Rows] | None = None,
        num_rows: int | None = None,
        num_padded: int = 0,
    ) -> Step:
        if step_id is None:
            step_id = self._next_step
        self._next_step = step_id + 1 if isinstance(step_id, int) else self._next_step
        return _SilentStep(step_id)

    @property
    def is_closed(self) -> bool:
        return False

    @property
    def in_step(self) -> bool:
        return False

    def interval(self, cls: str, *, step_id: int = -1, mb: int = -1, peer: int = -1, num_bytes: int = 0) -> Interval:
        return self._interval

    def request(self, event: str, request: str, **fields: Any) -> None:
        return None

    def append(self, table: str, row: Mapping[str, Any]) -> None:
        return None

    def explicit_tap(self, tensor: torch.Tensor, name: str) -> None:
        return None

    def set_rules(self, rules: Sequence[Rule], *, for_s: float | None = None, who: str = "") -> int:
        return 0

    def rules(self) -> Standing:
        return Standing(0, (), None, 0)

    def sites(self) -> tuple[Site, ...]:
        return ()

    def coverage(self) -> Coverage:
        return Coverage(0, [], 0)

    def stats(self) -> Stats:
        return Stats(0, "off", -1, -1, {}, {}, {}, 0, 0, 0.0)

    def collect(
        self, inputs: Iterable[Any], call: Callable[[Any], Any] | None = None, *, timeout_s: float = 60.0
    ) -> Collected:
        from insitu.session.collecting import nothing

        for each in inputs if call is not None else ():
            assert call is not None, "there is one"
            call(each)
        return nothing()

    def flush(self, timeout_s: float = 5.0) -> FlushReport:
        return FlushReport(0, 0, 0)

    def dump(self, why: str) -> str | None:
        return None

    def detach(self) -> None:
        return None

    def close(self, timeout_s: float = 5.0) -> FlushReport:
        return FlushReport(0, 0, 0)
