"""What the plug-in does not know or cannot tell: it says so in one line, and vLLM answers as ever."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from vllm_cases import REPEATING, SHORT, Reference, Run, refused_runner

LINES = {
    "speculative": "rank 0: tensors and row maps not observed: speculative decoding is on, whose rows may be taken "
    "back",
    "unknown-model": "rank 0: tensors not observed: nobody has verified where the sites of a OPTForCausalLM are",
    "no-such-site": "rank 0: rows of requests not observed: INSITU_VLLM_ROWS: no site matches "
    "'L*.resid_pots'; the nearest are L*.resid_post, L*.resid_mid, L*.mlp_out",
    "graph": "rank 0: rows of requests not observed: in the one graph that vLLM makes they cost every step; "
    "INSITU_VLLM_ROWS=L*.resid_post takes them",
    "other-plugin": "rank 0: tensors and row maps not observed: __main__ holds on to vLLM's runner as well, and may "
    "change what it computes",
    "unknown-version": "vLLM 9.99.0 is not known here (known: 0.32); nothing is observed, and vLLM runs as without "
    "insitu",
}


@pytest.mark.parametrize("name", LINES)
def test_it_is_said_in_one_line(refused: Mapping[str, Run], name: str) -> None:
    assert refused[name].said() == [LINES[name]]


def test_a_runner_of_another_generation_is_refused_in_one_line(vllm_python: str) -> None:
    line = refused_runner(vllm_python)
    assert line.startswith("the runner vllm.v1.worker.gpu.model_runner.GPUModelRunner is of another generation")
    assert "_model_forward" in line and "VLLM_USE_V2_MODEL_RUNNER=0" in line


@pytest.mark.parametrize("name", [*sorted(LINES.keys() - {"unknown-model"}), "broken"])
def test_the_engine_answers_as_transformers_does(refused: Mapping[str, Run], name: str, reference: Reference) -> None:
    for request, prompt in zip(refused[name].answered["requests"], REPEATING, strict=True):
        assert request["output"] == reference.continued(prompt, SHORT)


@pytest.mark.parametrize("name", ["speculative", "unknown-model", "other-plugin", "no-such-site", "graph"])
def test_intervals_and_steps_are_observed_all_the_same(refused: Mapping[str, Run], name: str) -> None:
    run = refused[name]
    assert {row["rank"] for row in run.rows("intervals")} == {-1, 0}
    assert [step["step_id"] for step in run.rows("steps")] == list(range(len(run.rows("steps"))))
    has_rows = name not in ("speculative", "other-plugin")
    assert all(bool(step["rows"]) == has_rows for step in run.rows("steps"))


@pytest.mark.parametrize("name", ["speculative", "unknown-model", "other-plugin", "no-such-site", "graph"])
def test_what_is_not_observed_is_in_the_store(refused: Mapping[str, Run], name: str) -> None:
    run = refused[name]
    told = [row["text"] for row in run.rows("events") if row["kind"] == "not_observed"]
    assert told and "captures" not in run.store.tables()
    if name in LINES:
        assert told == [LINES[name].removeprefix("rank 0: ")]


def test_an_unknown_version_leaves_nothing_behind(refused: Mapping[str, Run]) -> None:
    assert not refused["unknown-version"].folder.exists()


def test_an_error_of_the_plug_in_is_contained_said_once_and_costs_its_part(refused: Mapping[str, Run]) -> None:
    run = refused["broken"]
    (line,) = run.said()
    assert line.startswith("the part for vLLM failed; vLLM runs on") and "broken on purpose" in line
    assert {row["rank"] for row in run.rows("intervals")} == {-1, 0}
    assert "steps" not in run.store.tables()
