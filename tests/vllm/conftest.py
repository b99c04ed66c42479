"""Where vLLM is: in an environment of its own, of which VLLM_PYTHON is the interpreter (`make test-vllm` says it)."""

from __future__ import annotations

import os

import pytest
from vllm_cases import Reference


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON names no interpreter that has vLLM; `make test-vllm` makes one")
    return python


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
