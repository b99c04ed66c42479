"""Fixtures of the end-to-end tests."""

from pathlib import Path

import pytest
from live_system import MODEL


@pytest.fixture(scope="session")
def model() -> Path:
    """The checkpoint the repository ships."""
    assert (MODEL / "model.safetensors").exists(), "examples/train_tiny_llama.py makes it"
    return MODEL
