"""Paths of modules, the same whether `torch.compile` wrapped parts of a model or not. Pure; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

_WRAPPER: Final = "_orig_mod"
"""Where `torch.compile(module)` keeps what it was given: a step of every path into it."""


def path_of(fqn: str) -> str:
    """Return the path of a module as it was before parts of its model were wrapped by `torch.compile`."""
    return fqn if _WRAPPER not in fqn else ".".join(step for step in fqn.split(".") if step != _WRAPPER)


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module, without wrappers of `torch.compile`."""
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
