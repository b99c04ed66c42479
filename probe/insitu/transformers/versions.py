"""Which transformers this is, and whether its insides are those that are known."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any, Final

logger = logging.getLogger("insitu")

KNOWN: Final = (5,)
"""Major versions whose `generate` and continuous batching are known; `docs/integrations.md` says which were tested."""
_said: Final[set[str]] = set()


def version() -> str:
    """Return the version of the transformers that the program has imported."""
    return str(getattr(sys.modules.get("transformers"), "__version__", "unknown"))


def why_unknown() -> str:
    """Return why nothing can be known of this version; empty where it can."""
    major = version().partition(".")[0]
    known = ", ".join(f"{each}.x" for each in KNOWN)
    return "" if major.isdecimal() and int(major) in KNOWN else f"is none of {known}"


def find(module: str, name: str) -> Any:
    """Return a class of transformers; `object`, which has nothing of it, where there is none."""
    try:
        return getattr(import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError):
        return object


def say_unknown(why: str) -> None:
    """Say in one line, once, what cannot be followed."""
    if why not in _said:
        _said.add(why)
        logger.warning("insitu: transformers %s %s; steps go on without row maps of it", version(), why)
