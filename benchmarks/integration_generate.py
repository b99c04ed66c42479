"""What attaching costs `generate` and `generate_batch`: copies of a model that share their weights, in one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import torch
from integration_turns import AGAIN, ATTACHED, DETACHED, Job, Measured, flushed_turns, model_of
from llamas import twin
from transformers import ContinuousBatchingConfig, GenerationConfig

import insitu
from insitu.session.stated import NOTHING

NOBODY: Final = "attached, rows of nobody"
"""With a session that is not told whose rows a step computes: what row maps cost is the difference."""
PROMPT: Final = 16
"""Tokens of each prompt."""


def generate(job: Job) -> Measured:
    """Measure steps of `model.generate`: the prompts, then a token of each sequence a step."""
    ids = prompts(job)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": job.steps, "do_sample": False}

    def run(model: Any) -> Callable[[], None]:
        return lambda: model.generate(ids, **options)

    with ExitStack() as opened:
        model = model_of(job)
        models = {name: twin(model) for name in (DETACHED, AGAIN, ATTACHED, NOBODY)}
        sessions = {name: attached(models[name], job, opened) for name in (ATTACHED, NOBODY)}
        sessions[NOBODY].follow(lambda *_: NOTHING)
        taken = flushed_turns(job, {name: run(each) for name, each in models.items()}, sessions)
    return Measured(f"generate, batch {job.batch}", "step", job.steps, *taken)


def generate_batch(job: Job) -> Measured:
    """Measure steps of continuous batching, by a manager that runs: `generate_batch` takes long to start one."""
    asked = prompts(job).tolist()
    num_blocks = job.batch * (PROMPT + job.steps + 16) // 16
    options = {
        "generation_config": GenerationConfig(
            max_new_tokens=job.steps, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        "continuous_batching_config": ContinuousBatchingConfig(
            max_batch_tokens=max(PROMPT * job.batch, 32), num_blocks=num_blocks, page_size=16
        ),
    }

    def run(manager: Any) -> Callable[[], None]:
        def call() -> None:
            waited = set(manager.add_requests(inputs=asked, max_new_tokens=job.steps))
            while waited:
                found = manager.get_result(timeout=1)
                if found is None:
                    assert manager.is_running(), "the manager ended"
                elif found.is_finished():
                    assert len(found.generated_tokens) == job.steps, found
                    waited.remove(found.request_id)

        return call

    with ExitStack() as opened:
        model = model_of(job)
        models = {name: twin(model) for name in (DETACHED, AGAIN, ATTACHED)}
        sessions = {ATTACHED: attached(models[ATTACHED], job, opened)}
        managers = {
            name: opened.enter_context(each.continuous_batching_context_manager(**options))
            for name, each in models.items()
        }
        taken = flushed_turns(job, {name: run(each) for name, each in managers.items()}, sessions)
    return Measured(f"generate_batch, {job.batch} prompts", "step", job.steps, *taken)


def attached(model: Any, job: Job, opened: ExitStack) -> insitu.Session:
    """Attach as by default, but for the governor, which would hide the price by sampling less."""
    return opened.enter_context(insitu.attach(model, to=job.store, overhead_budget=1.0))


def prompts(job: Job) -> torch.Tensor:
    """Return tokens of prompts, int64[batch, PROMPT]."""
    return torch.randint(6, 256, (job.batch, PROMPT), generator=torch.Generator().manual_seed(1))
