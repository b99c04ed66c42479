"""Rows that real tensor-parallel ranks recorded, put together, are those of the model in one piece."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sharded_ranks import SITES, TOKENS, llama

import insitu
from insitu_collector.store import Store, open_store

SCRIPT = Path(__file__).with_name("sharded_ranks.py")
EXAMPLE = Path(__file__).parents[2] / "examples/03_tensor_parallel.py"
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith("INSITU_")}
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def ran(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], env=VARIABLES, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("sharded") / "store"
    ran(str(SCRIPT), f"file://{path}")
    return open_store(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("whole") / "store"
    alone = llama()
    rules = [insitu.Rule(sites=site, requests="all") for site in SITES]
    with insitu.attach(alone, to=f"file://{path}", rules=rules) as session, torch.inference_mode():
        for number, request in enumerate(("warm-up", "asked")):
            with session.step(number, rows=[insitu.Rows(request, start=0, count=len(TOKENS), position=0)]):
                alone(torch.tensor([TOKENS]), use_cache=False)
            assert session.flush(timeout_s=30).pending == 0
    return open_store(path)


def test_columns_and_heads_of_two_ranks_are_those_of_one_model(sharded: Store, whole: Store) -> None:
    found, expected = sharded.tensors("asked"), whole.tensors("asked")
    assert set(found) == set(expected) == set(SITES)
    for site in SITES:
        assert found[site].positions.tolist() == list(range(len(TOKENS))) and not found[site].missing
        assert found[site].values.shape == expected[site].values.shape
        np.testing.assert_allclose(found[site].values, expected[site].values, rtol=2e-4, atol=2e-5)
    half = sharded.tensors("asked", "L1.mlp_act", rank=1)["L1.mlp_act"].values
    assert np.array_equal(half, found["L1.mlp_act"].values[:, half.shape[1] :])
    shards = set(zip(sharded.captures()["site"].to_pylist(), sharded.captures()["shard"].to_pylist(), strict=True))
    assert {kind for _, kind in shards} == {"head", "column", "replicated"}


def test_what_both_hold_whole_is_taken_once_and_is_the_same_bits(sharded: Store) -> None:
    stream = sharded.tensors("asked", "L1.resid_post")["L1.resid_post"]
    assert stream.unlike == ()
    assert sharded.captures(request="asked", site="L1.resid_post").num_rows == 2 * len(TOKENS)


def test_the_intervals_and_summaries_of_the_example_s_ranks_are_asked_by_rank(tmp_path: Path) -> None:
    ran(str(EXAMPLE), "--steps=40", f"--to=file://{tmp_path}/store")
    store = open_store(tmp_path / "store")
    waits = store.intervals(columns=["rank", "tp_rank", "ledger_class", "step_id"], steps=range(10, 20))
    of = {(row["rank"], row["tp_rank"], row["ledger_class"]) for row in waits.to_pylist()}
    assert {(0, 0, "collective"), (1, 1, "collective")} <= of
    assert set(store.summaries(rank=1)["tp_rank"].to_pylist()) == {1}
