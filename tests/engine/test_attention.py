"""Paged attention: reused slots, padding, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu_engine.request import Request


def poison(engine: Any) -> None:
    """Fill every block but the null block, written or not, with NaN."""
    for cache in engine.caches:
        for keys, values in cache.layers.values():
            keys[16:] = float("nan")
            values[16:] = float("nan")


def has_nan(engine: Any) -> bool:
    return any(bool(t.isnan().any()) for cache in engine.caches for pair in cache.layers.values() for t in pair)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_what_a_former_owner_left_in_a_block_is_never_read(
    num_stages: int, make_checkpoint: Callable[..., Path], local_engine: Any, expected: Any, draw_prompts: Any
) -> None:
    folder = make_checkpoint("mistral", 3)
    engine = local_engine(folder, num_stages)
    poison(engine)
    asked = draw_prompts(3, 6, 300)
    requests = [Request(name=f"r{i}", prompt=prompt, max_tokens=n) for i, (prompt, n) in enumerate(asked)]
    engine.run(requests)
    assert [request.output for request in requests] == expected(folder, asked)


def test_freed_slots_are_used_again_without_a_trace(
    make_checkpoint: Callable[..., Path], local_engine: Any, expected: Any, draw_prompts: Any
) -> None:
    folder = make_checkpoint("llama", 4)
    engine = local_engine(folder, 2, num_blocks=6)
    asked = draw_prompts(4, 12, 300)
    requests = [Request(name=f"r{i}", prompt=prompt, max_tokens=n) for i, (prompt, n) in enumerate(asked)]
    engine.run(requests)
    assert [request.output for request in requests] == expected(folder, asked)
    assert engine.scheduler.pool.num_free == 6


def test_a_request_that_is_not_finite_ends_alone_and_its_blocks_are_scrubbed(
    make_checkpoint: Callable[..., Path], local_engine: Any, expected: Any, draw_prompts: Any
) -> None:
    folder = make_checkpoint("llama", 5)
    engine = local_engine(folder, 1, num_blocks=12)
    asked = [(prompt, 12) for prompt, _ in draw_prompts(5, 4, 300)]
    requests = [Request(name=f"r{i}", prompt=prompt, max_tokens=n) for i, (prompt, n) in enumerate(asked)]
    victim = requests[1]

    def break_one(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        step = engine.scheduler.slots[0].step
        for row in step.rows:
            if row.request == victim.name and row.position + row.count > len(victim.prompt) + 3:
                output.view(-1, output.shape[-1])[row.start] = float("nan")

    handle = engine.stages[0].model.layers["1"].mlp.register_forward_hook(break_one)
    outcomes = engine.run(requests)
    handle.remove()
    ended = {outcome.request.name: outcome for outcome in outcomes if outcome.finish}
    assert ended[victim.name].finish == "not_finite"
    assert ended[victim.name].token is None
    wanted = expected(folder, asked)
    assert victim.output == wanted[1][: len(victim.output)]
    for request, output in zip(requests, wanted, strict=True):
        if request is not victim:
            assert ended[request.name].finish == "length"
            assert request.output == output
    again = Request(name="again", prompt=asked[0][0], max_tokens=12)
    engine.run([again])
    assert again.output == wanted[0]
    assert not has_nan(engine)
