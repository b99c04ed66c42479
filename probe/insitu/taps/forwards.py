"""How a module is observed: one instance gets a forward of its own, in front of the one it had.

A forward hook would do the same at twice the cost, since one hook moves `Module.__call__` off its fast path. A private
subclass would cost 2 us a site more: each class makes the interpreter look up every attribute of its modules anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any, Final

import torch
from torch import nn

_MARK: Final = "__insitu_observed__"
"""Attribute of the forwards that are given; who wraps one copies it."""
Forward = Callable[..., Any]
"""`forward(module, ...)`."""


class _Mark:
    """Whether a forward is still that of a session."""

    is_on = True


def give_forward(module: nn.Module, forward: Forward) -> Callable[[], None]:
    """Put a forward in front of what runs one instance; return the undo.

    A copy of the module keeps working, and so does what is pickled: a method is copied bound to the copy, and is
    pickled as the name of what its class has. Raises TypeError where an instance takes no attribute (compiled scripts).
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("a TorchScript module takes no forward")
    own = module.__dict__.get("forward")
    update_wrapper(forward, module.forward)
    # Whoever asks for the method's signature is shown that of a function, less the module.
    forward.__wrapped__ = getattr(module.forward, "__func__", module.forward)  # type: ignore[attr-defined]
    forward.__code__ = forward.__code__.replace()  # compilers count what they compile by code
    mark = _Mark()
    setattr(forward, _MARK, mark)
    given = module.__dict__["forward"] = MethodType(forward, module)

    def undo() -> None:
        mark.is_on = False
        if module.__dict__.get("forward") is not given:  # wrapped by somebody since: it stays, and finds no open step
            return
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own

    return undo


def forward_of(module: nn.Module) -> Forward:
    """Return what runs a module now."""
    own = module.__dict__.get("forward")
    if own is None and isinstance(of_class := getattr(type(module), "forward", None), FunctionType):
        return of_class
    if isinstance(own, MethodType) and own.__self__ is module:
        return own.__func__
    bound = module.forward  # it knows its module: put there by another library, or of a compiled script
    return lambda _, /, *args, **kwargs: bound(*args, **kwargs)


def is_observed(module: nn.Module) -> bool:
    """Tell whether taps or steps are in front of a module's own forward."""
    mark = getattr(module.__dict__.get("forward"), _MARK, None)
    return mark is not None and mark.is_on
