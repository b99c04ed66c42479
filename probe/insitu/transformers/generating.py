"""What `generate` tells: that a call of it begins and ends, and after each token which sequences are over.

Functions of transformers' classes are wrapped, once a process, and not those of one model: a call may begin before its
model is attached (`insitu run`), and may be made by a module around it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

from insitu.transformers.calls import Call, call_of, calling, current_call

Function = Callable[..., Any]
_REFUSED: Final[Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "custom_generate": ("a decoding loop of its own (custom_generate)", lambda value: value is not None),
    "assistant_early_exit": ("early-exit drafts run in the model itself", lambda value: value is not None),
    "guidance_scale": ("classifier-free guidance runs the model twice a token", lambda value: value not in (None, 1)),
}
"""Settings with which not every forward of a call is one step of its sequences: why, and what values they are."""


def wrap(owner: Any, name: str, around: Callable[[Function], Function]) -> bool:
    """Put a wrapper around a function of a class, unless it is there; return False where there is no such function.

    Whoever wraps it too keeps his: each calls the other.
    """
    function = vars(owner).get(name)
    if not callable(function):
        return False
    inner = function
    while inner is not None:
        if getattr(inner, "_is_insitus", False):
            return True
        inner = getattr(inner, "__wrapped__", None)
    wrapper = functools.wraps(function)(around(function))
    wrapper._is_insitus = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)
    return True


def around_generate(generate: Function) -> Function:
    """Return `GenerationMixin.generate` with its calls known."""

    def call_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        asked = functools.partial(_asked, self, config, kwargs)
        outer = call_of(self)
        if outer is not None:  # some modes call it again
            outer.refused = outer.refused or _why_refused(asked)
            return generate(self, *args, **kwargs)
        num_beams = asked("num_beams") or 1
        call = Call(weakref.ref(self), num_beams, 1 if num_beams > 1 else asked("num_return_sequences") or 1)
        call.refused = _why_refused(asked)
        with calling(call):
            return generate(self, *args, **kwargs)

    return call_generate


def around_criteria(criteria: Function) -> Function:
    """Return `StoppingCriteriaList.__call__`, which is asked after each token, with its answer known."""

    def call_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_over = criteria(self, *args, **kwargs)
        if (call := current_call()) is not None:
            call.note_token(is_over)
        return is_over

    return call_criteria


def _asked(model: Any, config: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Return a setting of a call: as an argument, else of the configuration that is given, else of the model's."""
    found = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in found if value is not None), None)


def _why_refused(asked: Callable[[str], Any]) -> str:
    return next((why for name, (why, is_so) in _REFUSED.items() if is_so(asked(name))), "")
