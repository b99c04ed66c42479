"""Forwards whose tensors are not those of the model: under a transform of torch.func, forward-mode AD, torch.jit.trace.

No tap could write what such tensors hold, and none belongs in a recorded graph: the model runs by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.autograd import forward_ad

from insitu.taps.compilers import Compiler, put_aside, under, with_own_code

if TYPE_CHECKING:
    from insitu.session.live import Session
    from insitu.taps.eager import Current

logger = logging.getLogger("insitu")

FORWARD_TRANSFORMED: Final = "forward_transformed"
_SAID: Final = (
    "a forward under a transform of torch (vmap, grad or jvp of torch.func, forward-mode AD, torch.jit.trace) ran "
    "unobserved, as all like it will; others are observed"
)
_level_of_func: Final[Callable[[], int | None]] = torch._C._functorch.maybe_current_level
_tracing_state: Final[Callable[[], object]] = torch._C._get_tracing_state


def is_transformed() -> bool:
    """Tell whether what runs on this thread is transformed or recorded: tensors stand for others then.

    A compiler that looks at this function has put the transforms aside: ask when the compiler is.
    """
    return _level_of_func() is not None or _tracing_state() is not None or forward_ad._current_level >= 0


class Transformed:
    """Runs the forwards of one model that are transformed, without taps; the first is said."""

    def __init__(self, inner: Callable[..., Any], session: Session, current: Current) -> None:
        self._inner, self._compiled = inner, with_own_code(inner)
        self._session = session
        self._current = current
        self._is_said = False

    def run(self, compiler: Compiler, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one forward, args beginning with the module; an open step has none of it.

        `compiler` was put aside and is back in its place after it.
        """
        self.say()
        current, in_step = self._current, self._session.in_step  # taps of another thread's step go on
        thread = current.thread
        if in_step:
            current.thread = 0
        try:
            if compiler is None:
                return self._inner(*args, **kwargs)
            return under(compiler, self._compiled, *args, **kwargs)
        finally:
            if in_step:
                current.thread = thread
            put_aside(compiler)

    def say(self) -> None:
        """Say it, once."""
        if not self._is_said:
            self._is_said = True
            logger.warning("insitu: %s", _SAID)
            self._session.event(FORWARD_TRANSFORMED, _SAID)
