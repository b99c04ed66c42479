"""Every architecture that is said to be supported, against transformers, and what a stage holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu_engine.checkpoint import open_checkpoint
from insitu_engine.request import Request
from insitu_engine.stage import Stage

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "qwen3", "mistral"])
def test_greedy_output_is_that_of_transformers(
    kind: str,
    num_stages: int,
    make_checkpoint: Callable[..., Path],
    local_engine: Any,
    expected: Any,
    draw_prompts: Any,
    commit_seed: int,
) -> None:
    folder = make_checkpoint(kind, commit_seed)
    asked = draw_prompts(commit_seed, 8, 300)
    requests = [Request(name=f"r{i}", prompt=prompt, max_tokens=n) for i, (prompt, n) in enumerate(asked)]
    local_engine(folder, num_stages).run(requests)
    assert [request.output for request in requests] == expected(folder, asked), f"seed {commit_seed}"


def test_a_stage_holds_its_own_layers_only(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_checkpoint())
    front, back = Stage(checkpoint, range(3)), Stage(checkpoint, range(3, 4))
    for stage in (front, back):
        stage.load(checkpoint, torch.float32, CPU)
    names = [{name for name, _ in stage.named_parameters()} for stage in (front, back)]
    assert "model.embed_tokens.weight" in names[0]
    assert "lm_head.weight" in names[1]
    assert "model.norm.weight" in names[1]
    assert {name.split(".")[2] for name in names[0] if ".layers." in name} == {"0", "1", "2"}
    assert {name.split(".")[2] for name in names[1] if ".layers." in name} == {"3"}
    assert not names[0] & names[1]
    assert all(not p.is_meta for stage in (front, back) for p in (*stage.parameters(), *stage.buffers()))
    whole = sum(checkpoint.layer_bytes) + checkpoint.head_bytes + 300 * 64 * 4
    assert sum(p.nbytes for stage in (front, back) for p in stage.parameters()) == whole


def test_a_tied_head_is_the_embedding_where_both_are_on_one_stage(make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_checkpoint("llama-tied"))
    alone: Any = Stage(checkpoint, range(4))
    alone.load(checkpoint, torch.float32, CPU)
    assert alone.lm_head.weight is alone.model.embed_tokens.weight
    last: Any = Stage(checkpoint, range(2, 4))
    last.load(checkpoint, torch.float32, CPU)
    assert torch.equal(last.lm_head.weight, alone.lm_head.weight)


def test_two_models_of_one_process_keep_their_own_attention(make_checkpoint: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint()
    other: Any = AutoModelForCausalLM.from_pretrained(folder)
    before = other.config._attn_implementation
    Stage(open_checkpoint(folder), range(4))
    assert other.config._attn_implementation == before != "insitu_paged"
