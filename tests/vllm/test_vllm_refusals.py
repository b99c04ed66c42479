"""What the plug-in does not know or cannot tell: it says so in one line, and vLLM answers as ever."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

import pytest
from random_checkpoints import make
from vllm_cases import Engine, Reference, Run, ask, environment, prompts, run_vllm

NUM_TOKENS = 6
PROMPTS = [prompt * 2 for prompt in prompts([9, 14])]
"""Each says everything twice, so that speculation by what was said before has something to go by."""


@pytest.fixture(scope="module")
def runs(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    folder = tmp_path_factory.mktemp("refused")
    batch = [[ask(prompt, NUM_TOKENS, capture=True) for prompt in PROMPTS]]
    eager = {"enforce_eager": True}
    guess = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    unknown = {"model": str(make("OPT", folder / "opt")), "skip_tokenizer_init": True}
    engines = (
        Engine("speculative", batch, {**eager, "speculative_config": guess}),
        Engine("unknown-model", batch, {**eager, **unknown}),
        Engine("no-such-site", batch, eager, {"INSITU_VLLM_ROWS": "L*.resid_pots"}),
        Engine("compiled", batch, {}, {"INSITU_VLLM_ROWS": ""}),
        Engine("other-plugin", batch, eager, {}, "other_plugin"),
        Engine("broken", batch, eager, {}, "broken_row_maps"),
        Engine("unknown-version", batch, eager, {}, "other_version"),
    )
    found = run_vllm(vllm_python, folder, *engines)
    return {engine.name: run for engine, run in zip(engines, found, strict=True)}


LINES = {
    "speculative": "rank 0: tensors and row maps not observed: speculative decoding is on, whose rows may be taken "
    "back",
    "unknown-model": "rank 0: tensors not observed: nobody has verified where the sites of a OPTForCausalLM are",
    "no-such-site": "rank 0: rows of requests not observed: INSITU_VLLM_ROWS: no site of this model matches "
    "'L*.resid_pots'",
    "other-plugin": "rank 0: tensors and row maps not observed: __main__ holds on to vLLM's runner as well, and may "
    "change what it computes",
    "unknown-version": "vLLM 9.99.0 is not known here (known: 0.32); nothing is observed, and vLLM runs as without "
    "insitu",
}


@pytest.mark.parametrize("name", LINES)
def test_it_is_said_in_one_line(runs: Mapping[str, Run], name: str) -> None:
    assert runs[name].said() == [LINES[name]]


def test_a_runner_of_another_generation_is_refused_in_one_line(vllm_python: str) -> None:
    """It wants an accelerator, or Triton for the host: its class is all that can be had here."""
    look = (
        "from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner\n"
        "from insitu.vllm.versions import refused_runner\n"
        "print(refused_runner(Runner.__new__(Runner)))"
    )
    told = subprocess.run([vllm_python, "-c", look], env=environment("file://nowhere"), capture_output=True, text=True)
    line = told.stdout.splitlines()[-1]
    assert line.startswith("the runner vllm.v1.worker.gpu.model_runner.GPUModelRunner is of another generation")
    assert "_model_forward" in line and "VLLM_USE_V2_MODEL_RUNNER=0" in line


@pytest.mark.parametrize("name", [*sorted(LINES.keys() - {"unknown-model"}), "compiled", "broken"])
def test_the_engine_answers_as_transformers_does(runs: Mapping[str, Run], name: str, reference: Reference) -> None:
    for request, prompt in zip(runs[name].answered["requests"], PROMPTS, strict=True):
        assert request["output"] == reference.continued(prompt, NUM_TOKENS)


@pytest.mark.parametrize("name", ["speculative", "unknown-model", "other-plugin", "no-such-site", "compiled"])
def test_intervals_and_steps_are_observed_all_the_same(runs: Mapping[str, Run], name: str) -> None:
    run = runs[name]
    assert {row["rank"] for row in run.rows("intervals")} == {-1, 0}
    assert [step["step_id"] for step in run.rows("steps")] == list(range(len(run.rows("steps"))))
    has_rows = name not in ("speculative", "other-plugin")
    assert all(bool(step["rows"]) == has_rows for step in run.rows("steps"))


@pytest.mark.parametrize("name", ["speculative", "unknown-model", "other-plugin", "no-such-site", "compiled"])
def test_what_is_not_observed_is_in_the_store(runs: Mapping[str, Run], name: str) -> None:
    run = runs[name]
    told = [row["text"] for row in run.rows("events") if row["kind"] == "not_observed"]
    assert told and "captures" not in run.store.tables()
    if name in LINES:
        assert told == [LINES[name].removeprefix("rank 0: ")]


def test_an_unknown_version_leaves_nothing_behind(runs: Mapping[str, Run]) -> None:
    assert not runs["unknown-version"].folder.exists()


def test_an_error_of_the_plug_in_is_contained_said_once_and_costs_its_part(runs: Mapping[str, Run]) -> None:
    run = runs["broken"]
    (line,) = run.said()
    assert line.startswith("the part for vLLM failed; vLLM runs on") and "broken on purpose" in line
    assert {row["rank"] for row in run.rows("intervals")} == {-1, 0}
    assert "steps" not in run.store.tables()
