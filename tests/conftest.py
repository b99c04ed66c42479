"""What tests of several packages use."""

from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[1] / "examples" / "models" / "tiny-llama"


@pytest.fixture(scope="session")
def model() -> Path:
    """The checkpoint the repository ships."""
    assert (MODEL / "model.safetensors").exists(), "examples/train_tiny_llama.py makes it"
    return MODEL
