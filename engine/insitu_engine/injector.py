"""The hand that makes faults (see `insitu_engine.inject`): forward hooks of one rank's stage, and a log."""

from __future__ import annotations

import gc
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from insitu_engine.inject import Fault
from insitu_engine.messages import RowPlan

LONG_PAUSE_S: Final = 0.22
"""What the heap is sized for, so that a collection takes 150 ms with room to spare."""
COLLECT_EVERY_S: Final = 2.0
_NUM_CONTAINERS: Final = 60_000
_NUM_REFERENCES: Final = 40


def block(seconds: float) -> None:
    """Stand still without holding the interpreter: the rank's other threads go on."""
    threading.Event().wait(seconds)


class Act:
    """One fault of one rank: whether its time has come, and its lines in the log."""

    def __init__(self, fault: Fault, stage: int, rank: int, log: Path | None) -> None:
        self.fault = fault
        self.began = False
        self.over = False
        self._line = {"kind": fault.kind, "stage": stage, "rank": rank, "layer": fault.layer}
        self._log = log

    def due(self, step: int, since_s: float) -> bool:
        """Return whether to act on this step. step: counted from the end of warm-up; since_s: from first traffic."""
        if self.over or since_s < self.fault.start_s:
            return False
        if self.fault.end_s is not None and since_s >= self.fault.end_s:
            self.end()
            return False
        return self.fault.step is None or step >= self.fault.step

    def begin(self, step_id: int, ms: float | None, unix_ns: int | None = None) -> None:
        """Write the first line, once."""
        if not self.began:
            self.began = True
            self._line |= {"step": step_id if self.fault.step is not None else None, "ms": ms}
            self._line |= {"unix_ns": unix_ns or time.time_ns(), "end_unix_ns": None}
            self._write("began")

    def end(self) -> None:
        """Write the last line, once, if there was a first."""
        if self.began and not self.over:
            self._line["end_unix_ns"] = time.time_ns()
            self._write("ended")
        self.over = True

    def _write(self, event: str) -> None:
        if self._log is not None:
            with self._log.open("a") as opened:
                opened.write(json.dumps({"event": event, **self._line}) + "\n")


class Injector:
    """All faults of one rank. Install before the probe attaches, so that the probe sees what they do."""

    def __init__(
        self,
        stage: nn.Module,
        acts: Sequence[Act],
        *,
        clock: Callable[[], float] = time.monotonic,
        blocked: Callable[[float], None] = block,
    ) -> None:
        self._acts = acts
        self._clock = clock
        self._blocked = blocked
        self._first_step: int | None = None
        self._began_s: float | None = None
        self._step_id = -1
        self._rows: Sequence[RowPlan] = ()
        self._collected_s = 0.0
        self._heap: list[list[Any]] = large_heap() if any(act.fault.kind == "gc" for act in acts) else []
        stage.register_forward_pre_hook(self._before_forward)
        for act in acts:
            if act.fault.kind == "nan":
                _inner_mlp(stage, act.fault.layer).register_forward_hook(self._poison(act))

    def traffic_from(self, step_id: int) -> None:
        """Warm-up is over: count steps from this one."""
        self._first_step = step_id

    def begin_step(self, step_id: int, rows: Sequence[RowPlan]) -> None:
        """Say which step the next forward is."""
        self._step_id, self._rows = step_id, rows
        if self._began_s is None and self._first_step is not None and step_id >= self._first_step:
            self._began_s = self._clock()

    def close(self) -> None:
        """Write the last line of what is still going on."""
        for act in self._acts:
            act.end()

    def _due(self, act: Act) -> bool:
        if self._began_s is None or self._first_step is None:
            return False
        return act.due(self._step_id - self._first_step, self._clock() - self._began_s)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        for act in self._acts:
            if act.fault.kind == "nan" or not self._due(act):
                if act.over and act.fault.kind == "gc" and self._heap:
                    gc.freeze()
                    self._heap = []
                continue
            if act.fault.kind == "gc":
                self._collect(act)
                continue
            assert act.fault.ms is not None, "a fault that blocks says for how long"
            act.begin(self._step_id, act.fault.ms)
            self._blocked(act.fault.ms / 1000)
            if act.fault.kind == "hang":
                act.end()

    def _collect(self, act: Act) -> None:
        now = self._clock()
        if act.began and now - self._collected_s < COLLECT_EVERY_S:
            return
        if not act.began:
            gc.unfreeze()
        self._collected_s = now
        for _ in range(1000):
            cycle: list[Any] = []
            cycle.append(cycle)
        began, began_unix_ns = time.perf_counter(), time.time_ns()
        gc.collect()
        act.begin(self._step_id, round(1000 * (time.perf_counter() - began), 3), began_unix_ns)

    def _poison(self, act: Act) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if not self._due(act):
                return
            row = self._rows[0]
            output.view(-1, output.shape[-1])[row.start + row.count - 1] = float("nan")
            act.begin(self._step_id, None)
            act.end()

        return hook


def _inner_mlp(stage: nn.Module, layer: int | None) -> nn.Module:
    """Return the module whose output is the layer's mlp output: its last projection where it has one."""
    mlp: Any = stage.model.layers[str(layer)].mlp  # type: ignore[union-attr, index]
    found: nn.Module = getattr(mlp, "down_proj", mlp)
    return found


def large_heap(pause_s: float = LONG_PAUSE_S) -> list[list[Any]]:
    """Return live containers so many that one collection of this process takes `pause_s`, then set all aside.

    Until `gc.unfreeze` no collection sees them. They refer to each other at random: a collection visits every
    reference, mostly out of cache.
    """
    gc.unfreeze()
    gc.collect()  # the first one also copies the pages that a fork shares
    heap: list[list[Any]] = []
    shuffled = random.Random(0)
    while _collection_s() < pause_s:
        fresh: list[list[Any]] = [[] for _ in range(_NUM_CONTAINERS)]
        others = fresh.copy()
        shuffled.shuffle(others)
        for at, holder in enumerate(fresh):
            holder += others[at : at + _NUM_REFERENCES]
        heap += fresh
    gc.freeze()
    return heap


def _collection_s() -> float:
    """Return what one full collection takes of this thread's CPU time."""
    began = time.thread_time()
    gc.collect()
    return time.thread_time() - began


def install(
    stage: nn.Module,
    faults: Sequence[Fault],
    *,
    layers: range,
    stage_number: int,
    rank: int,
    log: Path | None,
) -> Injector | None:
    """Install the faults that are this rank's; None when there are none."""
    mine = [
        Act(fault, stage_number, rank, log)
        for fault in faults
        if fault.stage == stage_number or fault.rank == rank or (fault.layer is not None and fault.layer in layers)
    ]
    return Injector(stage, mine) if mine else None
