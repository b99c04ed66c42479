"""Paths of modules, the same whether torch wrapped parts of a model (compiled, sharded) or not. Pure; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

_WRAPPERS: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Where `torch.compile(module)`, FSDP and checkpointing keep what they were given: a step of every path into it."""


def path_of(fqn: str) -> str:
    """Return the path of a module as it was before parts of its model were wrapped."""
    steps = fqn.split(".")
    return fqn if _WRAPPERS.isdisjoint(steps) else ".".join(step for step in steps if step not in _WRAPPERS)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, without torch's wrappers."""
    return {path_of(fqn): module for fqn, module in model.named_modules()}


def outermost_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, of what `torch.compile` wrapped the wrapper: what comes out of it is seen in eager."""
    found: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules():
        found.setdefault(path_of(fqn), module)
    return found


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the paths of parts that are compiled by themselves, by `torch.compile(part)` or `part.compile()`."""
    return [fqn for fqn, module in outermost_of(model).items() if fqn and _is_compiled(module)]


def is_inside(fqn: str, part: str) -> bool:
    """Tell whether a path is that of a part, or of something in it."""
    return fqn == part or fqn.startswith(f"{part}.")


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
