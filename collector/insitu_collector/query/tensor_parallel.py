"""What tensor-parallel ranks hold of one site, put together. Pure: on bytes, so that every type is alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu_collector.query.asked import BadQuestion

Bytes = NDArray[np.uint8]
SIDE_BY_SIDE: Final = ("head", "column")
"""Each rank holds some of the columns, in the order of the ranks."""
WHOLE: Final = "replicated"


@dataclass(frozen=True, slots=True)
class Shard:
    """How ranks hold a site, and which ranks there are."""

    site: str
    kind: str
    tp_ranks: tuple[int, ...]

    def check(self, dtype: str) -> None:
        """Raise BadQuestion where their rows cannot be put together."""
        if len(self.tp_ranks) < 2:
            return
        alone = "ask with rank=... for what one rank holds"
        if self.kind == "partial":
            raise BadQuestion(
                f"{self.site} is a partial sum on each of {len(self.tp_ranks)} tensor-parallel ranks: only their sum "
                f"means something, and nothing says in which precision they add it; {alone}"
            )
        if self.kind not in (*SIDE_BY_SIDE, WHOLE):
            raise BadQuestion(f"{self.site}: nobody knows how ranks hold what is {self.kind!r}; {alone}")
        if self.kind in SIDE_BY_SIDE and "+" in dtype:
            raise BadQuestion(f"{self.site}: the largest values of each rank's columns are not those of all; {alone}")

    def needed(self) -> tuple[int, ...]:
        """Return the ranks without which a row is not whole; any one will do where all hold the same."""
        return self.tp_ranks if self.kind in SIDE_BY_SIDE else ()


def merged(shard: Shard, parts: Mapping[int, Bytes]) -> tuple[Bytes, NDArray[np.int64]]:
    """Return rows [n, bytes] made of each rank's [n, bytes of the rank], and which rows ranks disagree about.

    parts: by tensor-parallel rank. Of rows that all hold whole, the lowest rank's are taken.
    """
    ranks = sorted(parts)
    nobody = np.zeros(0, np.int64)
    if shard.kind in SIDE_BY_SIDE:
        assert set(ranks) == set(shard.tp_ranks), "rows that lack a rank's part were left out"
        return (parts[ranks[0]], nobody) if len(ranks) == 1 else (np.hstack([parts[r] for r in ranks]), nobody)
    first = parts[ranks[0]]
    unlike = np.zeros(len(first), bool)
    for rank in ranks[1:]:
        same_shape = parts[rank].shape == first.shape
        unlike |= (parts[rank] != first).any(axis=1) if same_shape else np.ones(len(first), bool)
    return first, np.flatnonzero(unlike)
