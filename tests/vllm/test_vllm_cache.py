"""vLLM's compile cache and taps: a graph out of the cache is one with these taps, never one with others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from vllm_cases import TOLERANCE, Reference, Run, compare

pytestmark = pytest.mark.soak
"""vLLM compiles twice: `make test-vllm ARGS="-m soak"`. In short: `tests/probe/test_vllm_compiled.py`, and the key in
`test_vllm_pipeline.py`."""

LAYERS = {"made": range(1, 5), "loaded": range(1, 5), "other": range(2, 6)}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_those_of_transformers(cached: Mapping[str, Run], name: str, reference: Reference) -> None:
    run = cached[name]
    assert compare(run, reference, [f"L{layer}.resid_post" for layer in LAYERS[name]]).difference <= TOLERANCE
    assert {row["site"] for row in run.store.captures(columns=["site"]).to_pylist()} == {
        f"L{layer}.resid_post" for layer in LAYERS[name]
    }
    assert run.said() == []


def test_the_second_process_loads_the_graph_and_one_with_other_rows_does_not(cached: Mapping[str, Run]) -> None:
    keys = {name: run.answered["keys"][0] for name, run in cached.items()}
    assert {name: found["loaded"] > 0 for name, found in keys.items()} == {
        "made": False,
        "loaded": True,
        "other": False,
    }
    assert keys["made"]["key"] == keys["loaded"]["key"] != keys["other"]["key"]
    assert keys["made"]["bare"] == keys["other"]["bare"], "without the digest nothing would tell them apart"
