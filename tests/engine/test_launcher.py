"""What a launch hands on, and what it keeps to the ranks."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from insitu_engine import launcher
from insitu_engine.checkpoint import open_checkpoint
from insitu_engine.config import EngineConfig, make_plan
from insitu_engine.errors import EngineError
from insitu_engine.inject import FAULTS_VARIABLE


def test_the_spec_of_a_fault_is_gone_once_the_ranks_are_forked(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_fork: list[str | None] = []

    def start(specs: Any, listener: Any, *, spawned: bool) -> tuple[()]:
        at_fork.append(os.environ.get(FAULTS_VARIABLE))
        return ()

    monkeypatch.setenv(FAULTS_VARIABLE, '["gc=0"]')
    monkeypatch.setattr(launcher, "_start", start)
    with socket.socket() as listener:
        launched = launcher.launch(EngineConfig(model=make_checkpoint()), listener)
    gc.unfreeze()
    assert at_fork == ['["gc=0"]']
    assert FAULTS_VARIABLE not in os.environ
    launched.close()
    launched.close()
    assert not Path(launched.folder.name).exists()


def test_a_plan_fits_layers_blocks_and_lengths(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    plan = make_plan(EngineConfig(model=checkpoint.path, num_stages=2, max_batch=4), checkpoint)
    assert plan.layers == (range(2), range(2, 4))
    assert plan.max_len == 256
    assert plan.limits.num_blocks == 2 * 4 * 16, "enough for every place at full length"
    assert plan.limits.num_slots == 2
    more = make_plan(EngineConfig(model=checkpoint.path, num_stages=2, in_flight=5, max_batch=4), checkpoint)
    assert (more.limits.num_slots, more.limits.num_blocks) == (5, 5 * 4 * 16)
    tight = make_plan(EngineConfig(model=checkpoint.path, num_stages=4, kv_bytes=50_000), checkpoint)
    assert tight.limits.num_blocks == 50_000 // (2 * 16 * 2 * 16 * 4)
    assert tight.max_len == 12 * 16
    given = make_plan(EngineConfig(model=checkpoint.path, num_stages=2, split=(3, 1), max_len=99), checkpoint)
    assert given.layers == (range(3), range(3, 4))
    assert given.max_len == 99


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_stages": 5}, "--stages 5"),
        ({"num_stages": 2, "split": (4, 1)}, "--split 4,1"),
        ({"kv_bytes": 100}, "--kv-mib"),
    ],
)
def test_what_does_not_fit_is_one_line(make_checkpoint: Callable[..., Path], options: Any, text: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    with pytest.raises(EngineError, match=text):
        make_plan(EngineConfig(model=checkpoint.path, **options), checkpoint)


def test_a_budget_without_room_for_prompts_is_refused() -> None:
    with pytest.raises(EngineError, match="--token-budget"):
        EngineConfig(model=Path(), max_batch=8, token_budget=8)
