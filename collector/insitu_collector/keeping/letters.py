"""What dead letters hold of what is erased. What reads them is imported only where there are any."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from insitu.segments.erasure import Erased
from insitu.segments.layout import FORMAT

if TYPE_CHECKING:
    from insitu_collector.subscriber.payloads import Origin


def erase_letters(store: Path, erased: Erased) -> int:
    """Take what is erased out of them; return how many items that were. Raises OSError."""
    dead = _dead(store)
    return dead.erase(store, erased) if erased and dead else 0


def num_in_letters(store: Path, erased: Erased) -> int:
    """Return how many items that would be."""
    dead = _dead(store)
    return dead.would_erase(store, erased) if erased and dead else 0


def letters_with(store: Path, erased: Erased) -> list[Path]:
    """Return those that hold some of it."""
    dead = _dead(store)
    return dead.holding(store, erased) if erased and dead else []


def rows_in_letters(store: Path) -> Iterable[Origin]:
    """Return which rows others had sent that they were made of."""
    dead = _dead(store)
    return dead.origins(store) if dead else ()


def _dead(store: Path) -> ModuleType | None:
    if not (store / FORMAT / "dead").is_dir():
        return None
    from insitu_collector.subscriber import dead

    return dead
