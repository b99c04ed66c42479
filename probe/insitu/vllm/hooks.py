"""How a name of vLLM is held on to: looked for, checked, wrapped once. What is not there is said, and stays as it is."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from insitu.guard import Guard

logger = logging.getLogger("insitu")

OWN: Final = ("vllm", "torch", "contextlib", "functools")
"""Packages whose functions vLLM itself puts around its methods."""
_MARK: Final = "__insitu_hook__"
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]

guard: Final = Guard("part for vLLM", "vLLM runs on, and what this part observes is missing", goes_on=True)
"""Where errors of this package stop."""


class NotThere(Exception):
    """A name of vLLM is missing, or is another thing than was known: one line."""


def say(text: str, *parts: object) -> None:
    """Say in one line what is not observed."""
    logger.warning("insitu: " + text, *parts)


def wrap(owner: Any, name: str, parameters: Sequence[str], around: Wrap) -> None:
    """Put a function in front of `owner.name`, once. Raises NotThere where it is not the one that is known."""
    found = getattr(owner, name, None)
    where = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not callable(found):
        raise NotThere(f"this vLLM has no {where}")
    if getattr(found, _MARK, False):
        return
    taken = inspect.signature(found).parameters
    if unknown := [each for each in parameters if each not in taken]:
        raise NotThere(f"{where} of this vLLM takes no {', '.join(unknown)}")
    wrapped = around(found)
    setattr(wrapped, _MARK, True)
    setattr(wrapped, "__wrapped__", found)
    setattr(owner, name, wrapped)


def stranger(found: Any) -> str | None:
    """Return the package that has put itself in front of a function of vLLM; None where nobody has."""
    while found is not None:
        function = getattr(found, "__func__", found)
        if not getattr(function, _MARK, False):
            module = getattr(function, "__globals__", {}).get("__name__", "")
            if module.partition(".")[0] not in OWN:
                return str(module) or repr(function)
        found = getattr(function, "__wrapped__", None)
    return None
