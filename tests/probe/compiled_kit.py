"""What tests of compiled models share: a model of a few layers, and ways to compile it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.mlp(x))


class Stack(nn.Module):
    """Layers and a head: sites `L0.mlp_out` ... `L2.resid_post`, `logits`."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Block(8) for _ in range(num_layers))
        self.lm_head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        output: torch.Tensor = self.lm_head(x)
        return output


def counting(backend: str = "eager") -> Any:
    """Return a backend that counts the graphs it compiles, and runs them as they are."""
    return CompileCounterWithBackend(backend)


def wrapped(model: nn.Module, backend: Any = "eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def in_mode(model: nn.Module, mode: str | None, dynamic: bool | None = None) -> Any:
    """dynamic: at once for any size, since to compile twice takes long."""
    return model if mode is None else torch.compile(model, backend=mode, fullgraph=True, dynamic=dynamic)


def compiled_itself(model: nn.Module, backend: Any = "eager") -> nn.Module:
    model.compile(backend=backend, fullgraph=True)
    return model
