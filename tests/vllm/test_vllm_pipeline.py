"""Two stages of vLLM, compiled: ranks agree on steps, wait for each other by name, show what a graph computed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from vllm_cases import NUM_LAYERS, TOLERANCE, Reference, Run, compare

from insitu.vocabulary import IntervalClass


def test_rows_out_of_the_graph_are_those_of_transformers(compiled: Run, reference: Reference) -> None:
    sites = [f"L{layer}.resid_post" for layer in range(NUM_LAYERS)]
    compared = compare(compiled, reference, [*sites, "logits"])
    assert compared.num_rows >= 4000
    assert compared.difference <= TOLERANCE


def test_both_stages_have_the_same_steps(compiled: Run) -> None:
    steps = {stage: {} for stage in (0, 1)}  # type: dict[int, dict[int, tuple[int, int]]]
    for row in compiled.rows("steps"):
        steps[row["stage"]][row["step_id"]] = (row["mb"], row["num_rows"])
    assert steps[0] == steps[1]
    assert list(steps[0]) == list(range(len(steps[0])))
    assert {mb for mb, _ in steps[0].values()} == {0, 1}, "two steps are in flight"


def test_the_sites_of_a_stage_are_those_of_its_layers(compiled: Run) -> None:
    found: dict[int, set[str]] = {0: set(), 1: set()}
    for row in compiled.rows("sites"):
        found[row["rank"]].add(row["name"])
    half = NUM_LAYERS // 2
    assert {name for name in found[0] if name.endswith("mlp_out")} == {f"L{layer}.mlp_out" for layer in range(half)}
    assert f"L{half - 1}.resid_post" in found[1] and f"L{half - 1}.resid_post" not in found[0]
    assert "embed" in found[0] and {"final_norm", "logits"} <= found[1]


def test_waits_name_whom_they_wait_for(compiled: Run) -> None:
    waits = {(row["rank"], row["peer"]) for row in compiled.rows("intervals") if row["cls"] == IntervalClass.RECV_WAIT}
    assert waits == {(0, 1), (0, -1), (1, 0), (1, -1)}
    steps = {row["step_id"] for row in compiled.rows("steps")}
    received = [row for row in compiled.rows("intervals") if row["rank"] == 1 and row["peer"] == 0]
    assert {row["step_id"] for row in received} == steps
    sent = [row for row in compiled.rows("intervals") if row["rank"] == 0 and row["cls"] == IntervalClass.SEND_WAIT]
    assert {row["step_id"] for row in sent} == steps
    assert all(row["peer"] == 1 and row["bytes"] > 0 for row in sent)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_accounts_for_all_of_its_time(compiled: Run, rank: int) -> None:
    rows = compiled.time_of(rank)
    assert all(before["t1_ns"] <= after["t0_ns"] for before, after in pairwise(rows))
    covered = sum(row["t1_ns"] - row["t0_ns"] for row in rows)
    assert covered >= 0.999 * (rows[-1]["t1_ns"] - rows[0]["t0_ns"])


def test_the_key_of_the_compile_cache_holds_what_is_tapped(compiled: Run) -> None:
    digests = {row["rank"]: row["plan_digest"] for row in compiled.rows("sources") if row["role"] == "rank"}
    for rank, found in enumerate(compiled.answered["keys"]):
        assert found["told"]["insitu"].startswith(digests[rank])
        assert found["key"] != found["bare"]


def test_the_judge_reads_it_as_it_does_the_engine(compiled: Run) -> None:
    ledger = compiled.store.stalls().ledger
    assert ledger is not None
    assert ledger.ranks == [0, 1]


def test_nothing_was_lost_and_no_site_was_silent(compiled: Run) -> None:
    assert "gaps" not in compiled.store.tables()
    assert compiled.said() == []
