"""Which vLLM is observed, and which of its modes are told to be beyond it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from insitu.vllm.versions import limits_of, refused_runner, refused_version


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.post1", "0.32.0+cpu"])
def test_versions_that_were_tested_are_observed(version: str) -> None:
    assert refused_version(version) is None


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0", "dev", "10.32.0"])
def test_any_other_is_refused_in_one_line_that_names_those_that_are_known(version: str) -> None:
    refused = refused_version(version)
    assert refused is not None and "\n" not in refused
    assert refused.startswith(f"vLLM {version} is not known here (known: 0.32)")


def configured(**options: Any) -> Any:
    parallel = SimpleNamespace(use_ubatching=options.get("use_ubatching", False))
    model = SimpleNamespace(runner_type=options.get("runner_type", "generate"))
    return SimpleNamespace(speculative_config=options.get("speculative"), parallel_config=parallel, model_config=model)


def test_an_ordinary_configuration_has_no_limits() -> None:
    assert limits_of(configured()) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"speculative": object()}, "speculative decoding is on, whose rows may be taken back"),
        ({"use_ubatching": True}, "micro-batch overlap is on, which runs a step's rows in two forwards"),
        ({"runner_type": "pooling"}, "a pooling model makes no tokens"),
    ],
)
def test_modes_in_which_rows_cannot_be_told_are_said(options: dict[str, Any], why: str) -> None:
    (limit,) = limits_of(configured(**options))
    assert str(limit) == f"tensors and row maps not observed: {why}"


def test_a_runner_is_known_by_what_it_has() -> None:
    first = SimpleNamespace(
        _model_forward=None, execute_model=None, sample_tokens=None, input_batch=None, query_start_loc=None
    )
    assert refused_runner(first) is None
    second = SimpleNamespace(execute_model=None, sample_tokens=None, input_batch=None)
    refused = refused_runner(second)
    assert refused is not None and "it has no _model_forward, query_start_loc" in refused
