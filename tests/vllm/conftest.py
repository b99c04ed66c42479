"""Where vLLM is: in an environment of its own, of which VLLM_PYTHON is the interpreter (`make test-vllm` says it).

Each way to run it is run once, for all tests that look at what came of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from vllm_cases import DEADLINE_S, Reference, Run, Shared, run_cached, run_compiled, run_eager, run_refused, run_shared
from vllm_served import Served, run_served


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests here the time that starting vLLM takes: whichever is first pays for it."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(5 * DEADLINE_S))


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON names no interpreter that has vLLM; `make test-vllm` makes one")
    return python


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="session")
def eager(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_eager(vllm_python, tmp_path_factory.mktemp("eager"))


@pytest.fixture(scope="session")
def compiled(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_compiled(vllm_python, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def shards(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return run_shared("Qwen3", vllm_python, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def refused(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    return run_refused(vllm_python, tmp_path_factory.mktemp("refused"))


@pytest.fixture(scope="session")
def cached(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    return run_cached(vllm_python, tmp_path_factory.mktemp("cached"))


@pytest.fixture(scope="session")
def served(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return run_served(vllm_python, tmp_path_factory.mktemp("served"))
