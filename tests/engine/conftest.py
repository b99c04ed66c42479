"""Checkpoints made on the fly, and an engine without processes: scheduler, stages and sampling in one thread."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from insitu_engine.checkpoint import Checkpoint, open_checkpoint
from insitu_engine.kv_cache import KvCache
from insitu_engine.messages import StepPlan
from insitu_engine.request import Request
from insitu_engine.sampling import sample
from insitu_engine.scheduler import Limits, Outcome, Scheduler
from insitu_engine.split import balanced, ranges
from insitu_engine.stage import Stage, step_inputs

CPU = torch.device("cpu")
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 12}),
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function that saves a small model with random weights and returns its folder."""

    def make(kind: str = "llama", seed: int = 0, **sizes: Any) -> Path:
        config, model, special = KINDS[kind]
        torch.manual_seed(seed)
        made = model(config(**{**SIZES, **special, **sizes}))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim > 1:
                    # Far from the zeros that initialisation leaves: answers differ from token to token.
                    parameter.mul_(4)
        folder: Path = tmp_path_factory.mktemp(kind)
        made.save_pretrained(folder)
        return folder

    return make


class LocalEngine:
    """Runs requests through `num_stages` stages, a step at a time, in this thread."""

    def __init__(self, folder: Path, num_stages: int = 1, **limits: int) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        split = balanced(self.checkpoint.layer_bytes, self.checkpoint.head_bytes, num_stages)
        self.stages = [self._stage(layers) for layers in ranges(split)]
        given = {"num_blocks": 64, "max_batch": 4, "token_budget": 24, **limits}
        self.caches = [
            KvCache(
                stage.layer_range,
                given["num_blocks"],
                self.checkpoint.num_kv_heads,
                self.checkpoint.head_dim,
                torch.float32,
                CPU,
            )
            for stage in self.stages
        ]
        self.scheduler = Scheduler(Limits(num_slots=num_stages, **given))

    def _stage(self, layers: range) -> Stage:
        stage = Stage(self.checkpoint, layers)
        stage.load(self.checkpoint, torch.float32, CPU)
        return stage

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> torch.Tensor:
        """Run one plan through all stages; return the logits [num_samples, vocab]."""
        hidden = torch.empty(0)
        for stage, cache in zip(self.stages, self.caches, strict=True):
            if plan.scrub:
                cache.scrub(plan.scrub)
            step = step_inputs(plan, cache, CPU)
            hidden = stage(step.tokens if stage.is_first else hidden, step)
        return hidden

    def step(self) -> list[Outcome] | None:
        """Run the next step; return what it did, or None when there is none."""
        plan = self.scheduler.plan()
        if plan is None:
            return None
        ids = sample(self.forward(plan), [row for row in plan.rows if row.sample_row >= 0])
        return self.scheduler.complete(plan.step_id, ids)

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run requests to their end; return every outcome."""
        for request in requests:
            self.scheduler.submit(request)
        outcomes: list[Outcome] = []
        while self.scheduler.has_work:
            outcomes += self.step() or []
        return outcomes


@pytest.fixture(scope="session")
def local_engine() -> type[LocalEngine]:
    return LocalEngine


@pytest.fixture(scope="session")
def expected() -> Callable[..., list[list[int]]]:
    """Return what `transformers` generates greedily: end-of-text off, each prompt alone."""

    def generate(folder: Path, asked: Sequence[tuple[Sequence[int], int]]) -> list[list[int]]:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        outputs = []
        with torch.inference_mode():
            for prompt, num_tokens in asked:
                ids = torch.tensor([list(prompt)])
                found = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
                )
                outputs.append(found[0, len(prompt) :].tolist())
        return outputs

    return generate


@pytest.fixture(scope="session")
def commit_seed() -> int:
    """A seed drawn from the commit's hash, so that each commit is tested on prompts and weights of its own."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    text = done.stdout.strip()
    return int(text[:8], 16) if done.returncode == 0 and text else 20_260_101


@pytest.fixture(scope="session")
def draw_prompts() -> Callable[..., list[tuple[list[int], int]]]:
    """Return a function that draws (prompt, output length) pairs, with lengths of 1..40 on both sides."""

    def draw(seed: int, num: int, vocab_size: int) -> list[tuple[list[int], int]]:
        rng = random.Random(seed)
        return [
            ([rng.randrange(vocab_size) for _ in range(rng.randint(1, 40))], rng.randint(1, 40)) for _ in range(num)
        ]

    return draw
