"""Two ranks of one stage, eager: each is told apart, waits for the other are seen, rows are taken once."""

from __future__ import annotations

from collections import Counter

import pytest
from random_checkpoints import NUM_LAYERS
from vllm_cases import TOLERANCE, Shared, compare, run_shared

from insitu.vocabulary import IntervalClass


@pytest.fixture(scope="module", params=["Qwen3", pytest.param("Qwen2", marks=pytest.mark.soak)])
def shared(vllm_python: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Shared:
    if request.param == "Qwen3":
        found: Shared = request.getfixturevalue("shards")
        return found
    return run_shared(request.param, vllm_python, tmp_path_factory.mktemp("q2"))


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
