"""What to do about what `insitu store verify` found, in the order in which it should be done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from insitu_collector.keeping.verifying import MOVE, Verified


def remedies(found: Verified, store: Path) -> list[str]:
    """Return a line for each thing that somebody should do; none of a store that is whole.

    What is not erased goes first: a repair would keep the originals of what is damaged of it.
    """
    lines = ["move what is no file out of it"] if any(each.remedy == MOVE for each in found.problems) else []
    return [*lines, *_commands(found, store)]


def _commands(found: Verified, store: Path) -> Iterator[str]:
    for word in ("compact", "repair"):
        waits_for = {each.waits_for for each in found.problems if each.remedy == word}
        if "" in waits_for:
            yield f"insitu store {word} {store}"
        if shards := sorted(waits_for - {""}):
            yield f"once nobody writes {', '.join(shards)}: insitu store {word} {store}"
