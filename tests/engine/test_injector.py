"""The hand that makes faults: when it acts, on what, and what its log says."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu_engine import injector as hand
from insitu_engine.inject import parse_fault
from insitu_engine.injector import Act, Injector, install
from insitu_engine.request import Request


class Bench:
    """A stage with faults, a clock that is set by hand, and a list of how long it was blocked."""

    def __init__(self, folder: Path, engine: Any, specs: list[str], log: Path, rank: int = 0) -> None:
        self.now_s = 100.0
        self.blocked: list[float] = []
        self.engine = engine(folder, 2)
        self.stage = self.engine.stages[rank]
        self.log = log
        layers = self.stage.layer_range
        found = [parse_fault(spec) for spec in specs]
        mine = [f for f in found if f.stage == rank or f.rank == rank or (f.layer is not None and f.layer in layers)]
        acts = [Act(fault, rank, rank, log) for fault in mine]
        self.injector = Injector(self.stage, acts, clock=lambda: self.now_s, blocked=self.blocked.append)
        self.num_steps = 0

    def step(self, after_s: float = 0.0) -> torch.Tensor:
        """Run one more step of one request, `after_s` later."""
        self.now_s += after_s
        scheduler = self.engine.scheduler
        if not scheduler.has_work:
            scheduler.submit(Request(name=f"r{self.num_steps}", prompt=[1, 2, 3], max_tokens=30))
        plan = scheduler.plan()
        self.injector.begin_step(plan.step_id, plan.rows)
        logits: torch.Tensor = self.engine.forward(plan)
        scheduler.complete(plan.step_id, [7] * plan.num_samples)
        self.num_steps += 1
        return logits

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def bench(make_checkpoint: Callable[..., Path], local_engine: Any, tmp_path: Path) -> Callable[..., Bench]:
    def make(*specs: str, rank: int = 0) -> Bench:
        return Bench(make_checkpoint(), local_engine, list(specs), tmp_path / "log.jsonl", rank)

    return make


def test_a_slow_stage_blocks_every_step_of_its_window_and_no_other(bench: Callable[..., Bench]) -> None:
    at = bench("slow-stage=0:25@2-4")
    at.step()
    at.injector.traffic_from(1)
    for _ in range(6):
        at.step(after_s=1)
    assert at.blocked == [0.025, 0.025]
    began, ended = at.lines()
    assert began["event"] == "began" and ended["event"] == "ended"
    assert began["kind"] == "slow_stage" and began["stage"] == 0 and began["ms"] == 25
    assert began["end_unix_ns"] is None and ended["end_unix_ns"] >= ended["unix_ns"] == began["unix_ns"]


def test_warm_up_is_never_disturbed(bench: Callable[..., Bench]) -> None:
    at = bench("slow-stage=0:25@0", "hang=0:0", "nan=0:0")
    for _ in range(3):
        assert bool(at.step(after_s=60).isfinite().all())
    assert at.blocked == []
    assert at.lines() == []


def test_a_hang_strikes_once_at_its_step(bench: Callable[..., Bench]) -> None:
    at = bench("hang=0:2:6.5")
    at.injector.traffic_from(0)
    for _ in range(5):
        at.step()
    assert at.blocked == [6.5]
    began, _ = at.lines()
    assert (began["kind"], began["rank"], began["step"], began["ms"]) == ("hang", 0, 2, 6500)


def test_the_other_rank_is_left_alone(bench: Callable[..., Bench]) -> None:
    at = bench("slow-stage=1:25@0", "hang=1:0", "nan=3:0", rank=0)
    at.injector.traffic_from(0)
    assert bool(at.step().isfinite().all())
    assert at.blocked == []


@pytest.mark.parametrize(("spec", "rank"), [("nan=1:2", 0), ("nan=3:2", 1)])
def test_nan_is_written_into_the_real_tensor_of_its_layer_once(
    bench: Callable[..., Bench], spec: str, rank: int
) -> None:
    at = bench(spec, rank=rank)
    at.injector.traffic_from(0)
    layer = parse_fault(spec).layer
    seen: list[bool] = []
    at.stage.model.layers[str(layer)].mlp.register_forward_hook(
        lambda module, args, output: seen.append(bool(output.isnan().any()))
    )
    logits = [at.step() for _ in range(4)]
    assert seen == [False, False, True, False]
    assert not bool(logits[2].isfinite().all())
    began, _ended = at.lines()
    assert (began["kind"], began["layer"], began["rank"], began["step"]) == ("nan", layer, rank, 2)


def test_collections_are_long_real_and_seconds_apart(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand, "LONG_PAUSE_S", 0.01)
    pauses: list[str] = []

    def on_collection(when: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            pauses.append(when)

    at = bench("gc=0@1-5")
    at.injector.traffic_from(0)
    try:
        gc.callbacks.append(on_collection)
        for _ in range(13):
            at.step(after_s=0.5)
    finally:
        gc.callbacks.remove(on_collection)
        gc.unfreeze()
    assert pauses.count("start") >= 2
    began, ended = at.lines()
    assert began["kind"] == "gc" and began["ms"] > 0
    assert ended["event"] == "ended"


def test_a_heap_makes_one_collection_take_what_was_asked() -> None:
    try:
        heap = hand.large_heap(0.05)
        gc.unfreeze()
        began = time.thread_time()
        gc.collect()
        assert time.thread_time() - began >= 0.025
        assert isinstance(heap, list)
    finally:
        gc.unfreeze()


def test_a_block_lets_other_threads_go_on() -> None:
    ran = threading.Event()
    thread = threading.Thread(target=ran.set)
    began = time.monotonic()
    thread.start()
    hand.block(0.05)
    assert ran.is_set()
    assert time.monotonic() - began >= 0.05
    thread.join()


def test_what_still_goes_on_is_closed_in_the_log(bench: Callable[..., Bench]) -> None:
    at = bench("slow-stage=0:1@0")
    at.injector.traffic_from(0)
    at.step()
    at.injector.close()
    at.injector.close()
    assert [line["event"] for line in at.lines()] == ["began", "ended"]


def test_a_rank_without_a_fault_has_no_injector(make_checkpoint: Callable[..., Path], local_engine: Any) -> None:
    stage = local_engine(make_checkpoint(), 2).stages[0]
    faults = [parse_fault("gc=1"), parse_fault("nan=3:1"), parse_fault("slow-stage=1:5")]
    assert install(stage, faults, layers=range(2), stage_number=0, rank=0, log=None) is None
