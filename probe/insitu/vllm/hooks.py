"""How a name of vLLM is held on to: looked for, checked, wrapped once. What is not there is said."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from insitu.guard import Guard

logger = logging.getLogger("insitu")

OWN: Final = ("vllm", "torch", "contextlib", "functools")
"""Packages whose functions vLLM itself puts around its methods."""
OF_SCHEDULER: Final = "requests and steps' numbers"
"""What is lost where a scheduler is not observed."""
_MARK: Final = "__insitu_hook__"
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

guard: Final = Guard("part for vLLM", "vLLM runs on, and what this part observes is missing", goes_on=True)
"""Where errors of this package stop."""


class NotThere(Exception):
    """A name of vLLM is missing, or is another thing than was known: one line."""


def say(text: str, *parts: object) -> None:
    """Say in one line what is not observed."""
    logger.warning("insitu: " + text, *parts)


def contain_start(error: Exception, lost: str) -> None:
    """Contain what kept a session from being had: settings and destinations say themselves what is to be mended."""
    if isinstance(error, OSError | ValueError):
        say("%s: not observed: %s", lost, error)
    else:
        guard.contain(error)


def wrap(owner: Any, name: str, parameters: Sequence[str], around: Wrap) -> None:
    """Put a function in front of `owner.name`, once. Raises NotThere where it is not the one that is known."""
    found = getattr(owner, name, None)
    where = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not callable(found):
        raise NotThere(f"this vLLM has no {where}")
    if getattr(found, _MARK, False):
        return
    taken = inspect.signature(found).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in taken.values())  # somebody's who passes on all of it
    if unknown := [each for each in parameters if each not in taken and not takes_all]:
        raise NotThere(f"{where} of this vLLM takes no {', '.join(unknown)}")
    wrapped = around(found)
    setattr(wrapped, _MARK, True)
    wrapped.__wrapped__ = found  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def stranger(owner: Any, name: str) -> str | None:
    """Return the package that has put itself in front of a method of vLLM's own; None where nobody has.

    A class of a user's own that overrides it is no stranger: vLLM was told to use it.
    """
    classes = [cls for cls in type(owner).__mro__ if cls.__module__.partition(".")[0] in OWN]
    found = [vars(each)[name] for each in (owner, *classes) if name in vars(each)]
    return next(filter(None, map(_stranger, found)), None)


def _stranger(found: Any) -> str | None:
    while found is not None:
        function = getattr(found, "__func__", found)
        if not getattr(function, _MARK, False):
            module = getattr(function, "__globals__", {}).get("__name__", "")
            if module.partition(".")[0] not in OWN:
                return str(module) or repr(function)
        found = getattr(function, "__wrapped__", None)
    return None
