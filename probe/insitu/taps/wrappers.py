"""Modules of torch that stand around a model or in its place: which are looked through, and which cannot be."""

from __future__ import annotations

from itertools import chain
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_WRAPPERS: Final = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
"""Modules that only call another, which is meant: by class, where they keep it."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that wrappers of torch (compiled, data-parallel, sharded) call in the end."""
    while (name := _WRAPPERS.get(type(module).__name__)) is not None and isinstance(
        inner := getattr(module, name, None), nn.Module
    ):
        module = inner
    return module


def check_exported(model: Any) -> None:
    """Raise ValueError, one line, for a model that was exported, or is copied in each call: none of its own modules
    is called."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError("DataParallel copies the model in each call; attach to one that DistributedDataParallel wraps")
    if isinstance(model, torch.export.ExportedProgram) or (
        isinstance(model, torch.fx.GraphModule) and not _calls_any(model)
    ):
        raise ValueError(
            "an exported model is one graph, in which no module is called; attach to torch.export.unflatten(program)"
        )


def check_made(model: nn.Module) -> None:
    """Raise ValueError, one line, for a module that a script was made of, or that lacks parameters until it is run."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a TorchScript module calls no module of Python; attach to the one that it was made of")
    if any(map(is_lazy, chain(model.parameters(), model.buffers()))):
        raise ValueError(
            f"this {type(model).__name__} has parameters that its first call makes; run it once, then attach"
        )


def _calls_any(model: torch.fx.GraphModule) -> bool:
    """Tell whether a graph calls a module that has parameters; one that was exported calls at most its own guards."""
    called = (model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module")
    return any(next(module.parameters(), None) is not None for module in called)
