"""Two ranks of one stage, eager: each is told apart, waits for the other are seen, rows are taken once."""

from __future__ import annotations

from collections import Counter

import pytest
from vllm_cases import NUM_LAYERS, TOLERANCE, Reference, Run, ask, compare, prompts, run_vllm

from insitu.vocabulary import IntervalClass

LENGTHS = (3, 8, 21, 70, 90)


@pytest.fixture(scope="module")
def run(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    batch = [ask(prompt, 5, capture=at % 2 == 0) for at, prompt in enumerate(prompts(LENGTHS))]
    engine = {"tensor_parallel_size": 2, "enforce_eager": True}
    return run_vllm(vllm_python, tmp_path_factory.mktemp("shards"), engine, [batch])


def test_rows_are_those_of_transformers_and_one_rank_takes_them(run: Run, reference: Reference) -> None:
    sites = [f"L{layer}.resid_post" for layer in range(NUM_LAYERS)]
    assert compare(run, reference, [*sites, "logits"]).difference <= TOLERANCE
    assert {row["rank"] for row in run.rows("captures")} == {0}


def test_ranks_are_told_apart(run: Run) -> None:
    ranks = [row for row in run.rows("sources") if row["role"] == "rank"]
    assert sorted((row["rank"], row["stage"], row["tp_rank"], row["pp_rank"]) for row in ranks) == [
        (0, 0, 0, 0),
        (1, 0, 1, 0),
    ]


def test_waits_for_the_other_rank_are_seen_in_every_layer(run: Run) -> None:
    steps = {row["step_id"] for row in run.rows("steps")}
    counts = Counter(
        (row["rank"], row["step_id"])
        for row in run.rows("intervals")
        if row["cls"] == IntervalClass.COLLECTIVE_WAIT and row["step_id"] >= 0
    )
    assert {step for _, step in counts} == steps
    assert all(counts[0, step] == counts[1, step] >= 2 * NUM_LAYERS for step in steps)
