"""What torch tells of its modules: which are called, in whose calls, which wrap others, which are put into `eval`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from threading import local
from types import FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS: Final = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
)
"""Where torch keeps hooks of all modules."""


def callers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in whose calls this thread is now, innermost first, without `module`."""
    call = nn.Module._call_impl.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is call and (caller := frame.f_locals["self"]) is not module:
            yield caller
        frame = frame.f_back


def arguments_of(module: nn.Module) -> tuple[Any, Any]:
    """Return what the module was called with, in whose call this thread is: (args, kwargs); nothing outside of one."""
    call = nn.Module._call_impl.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is call and frame.f_locals["self"] is module:
            return frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return (), {}


def is_traced() -> bool:
    """Tell whether this call records a graph, in which nothing of ours belongs."""
    if torch._C._get_tracing_state() is not None:
        return True
    return bool(
        torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        and torch.cuda.is_current_stream_capturing()
    )


def tell_of_calls(tell: Callable[[nn.Module, object], None]) -> Callable[[], None]:
    """Call `tell` before the forward of each module; return the undo.

    A compiled model warns its user of hooks like this; of ours it need not, which is gone before anything is compiled.
    """
    handle = torch_module.register_module_forward_pre_hook(tell)
    has_any: Any = getattr(torch_module, "_has_any_global_hook", None)

    def has_any_but_ours() -> bool:
        return any(len(getattr(torch_module, name, ())) > (name == "_global_forward_pre_hooks") for name in _HOOKS)

    if has_any is not None:
        torch_module._has_any_global_hook = has_any_but_ours

    def undo() -> None:
        handle.remove()
        if getattr(torch_module, "_has_any_global_hook", None) is has_any_but_ours:
            torch_module._has_any_global_hook = has_any

    return undo


def tell_of_eval(tell: Callable[[nn.Module], None]) -> Callable[[], None]:
    """Call `tell` with each module that is put into `eval` mode, not with its submodules; return the undo.

    That is `eval` or `train(False)`: the `eval` of transformers calls only the latter. Torch's `train` calls that of
    each submodule in turn, so of calls within one another the outermost counts.
    """
    here = local()

    def around(inner: Callable[..., Any], mode_of: Callable[..., bool]) -> Callable[..., Any]:
        @wraps(inner)
        def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or getattr(here, "is_inside", False):
                return inner(self, *args, **kwargs)
            here.is_inside = True
            try:
                result = inner(self, *args, **kwargs)
            finally:
                here.is_inside = False
            if not mode_of(*args, **kwargs):
                tell(self)
            return result

        return outer

    module: Any = nn.Module
    before = {"eval": module.eval, "train": module.train}
    ours = {"eval": around(module.eval, lambda: False), "train": around(module.train, lambda mode=True: mode)}
    for name, method in ours.items():
        setattr(module, name, method)

    def undo() -> None:
        for name, method in ours.items():
            if getattr(module, name) is method:
                setattr(module, name, before[name])

    return undo
