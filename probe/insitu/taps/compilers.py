"""What is asked of torch's compiler: to stay aside for a while, to leave a function alone, to take one for another.

It sees each Python frame that a thread enters. No option of it is touched and nothing is reset.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, Final

import torch
from torch import nn
from torch._C._dynamo import eval_frame

Compiler = Any
"""What looks at each frame that a thread enters; None where nothing is compiled."""
put_aside: Final[Callable[[Compiler], Compiler]] = eval_frame.set_eval_frame
"""Set this thread's compiler and return the one before. A call into C: it enters no frame."""


def under(compiler: Compiler, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a function for a compiler to see, which is aside before and after."""
    put_aside(compiler)
    try:
        return function(*args, **kwargs)
    finally:
        put_aside(None)


def fuses(compiler: Compiler) -> bool:
    """Tell whether it is Inductor, which makes other kernels of a model whose values are looked at, too."""
    while (behind := getattr(compiler, "_torchdynamo_orig_backend", None)) is not None:
        compiler = behind
    return getattr(compiler, "compiler_name", None) == "inductor"


def leave_out(code: CodeType) -> None:
    """Let no compiler begin with this function; frames that it enters are looked at as before."""
    frame, action = eval_frame._FrameExecStrategy, eval_frame._FrameAction
    eval_frame.set_code_exec_strategy(code, frame(action.SKIP, action.DEFAULT))


def look_again(module: nn.Module) -> None:
    """Let a compiled module choose again where its compiler begins: that depends on the forward of what it wraps."""
    while type(module).__name__ == "OptimizedModule":
        module._initialize()  # type: ignore[operator]
        module = module._orig_mod  # type: ignore[assignment]


def keep_in_place(tensor: torch.Tensor) -> None:
    """Tell the compiler that a tensor neither moves nor changes its shape: a CUDA graph needs no copy of it."""
    torch._dynamo.mark_static_address(tensor)
    torch._dynamo.mark_static(tensor)


def with_own_code(function: Any) -> Any:
    """Return a copy of a Python function that compilers take for another; what is none is returned as it is."""
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy
