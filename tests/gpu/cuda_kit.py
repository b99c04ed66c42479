"""What tests on a GPU share: when they run, and how they see that nothing waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest
import torch

NEEDS_CUDA: Final = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    # What torch says of itself on a device is no fault of ours: TF32 that is off, modes that are prototypes.
    pytest.mark.filterwarnings("default:::torch"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where this process makes the host wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
