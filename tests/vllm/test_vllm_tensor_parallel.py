"""Two ranks of one stage, eager: each is told apart, waits for the other are seen, rows are taken once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from random_checkpoints import NUM_LAYERS, make
from vllm_cases import TOLERANCE, Engine, Reference, Run, ask, compare, prompts, run_vllm

from insitu.vocabulary import IntervalClass

LENGTHS = (3, 8, 21, 70, 90)


@dataclass(frozen=True)
class Shared:
    run: Run
    reference: Reference


@pytest.fixture(scope="module", params=["Qwen3", pytest.param("Qwen2", marks=pytest.mark.soak)])
def shared(vllm_python: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Shared:
    folder = tmp_path_factory.mktemp("shards")
    model = make(request.param, folder / "model")
    batch = [ask(prompt, 5, capture=at % 2 == 0) for at, prompt in enumerate(prompts(LENGTHS))]
    options = {"model": str(model), "tensor_parallel_size": 2, "enforce_eager": True, "skip_tokenizer_init": True}
    (found,) = run_vllm(vllm_python, folder, Engine("eager", [batch], options))
    return Shared(found, Reference(model))


def test_rows_are_those_of_transformers_and_one_rank_takes_them(shared: Shared) -> None:
    sites = [f"L{layer}.resid_post" for layer in range(NUM_LAYERS)]
    assert compare(shared.run, shared.reference, [*sites, "logits"]).difference <= TOLERANCE
    assert {row["rank"] for row in shared.run.rows("captures")} == {0}


def test_ranks_are_told_apart(shared: Shared) -> None:
    ranks = [row for row in shared.run.rows("sources") if row["role"] == "rank"]
    assert sorted((row["rank"], row["stage"], row["tp_rank"], row["pp_rank"]) for row in ranks) == [
        (0, 0, 0, 0),
        (1, 0, 1, 0),
    ]


def test_waits_for_the_other_rank_are_seen_in_every_layer(shared: Shared) -> None:
    steps = {row["step_id"] for row in shared.run.rows("steps")}
    counts = Counter(
        (row["rank"], row["step_id"])
        for row in shared.run.rows("intervals")
        if row["cls"] == IntervalClass.COLLECTIVE_WAIT and row["step_id"] >= 0
    )
    assert {step for _, step in counts} == steps
    assert all(counts[0, step] == counts[1, step] >= 2 * NUM_LAYERS for step in steps)
