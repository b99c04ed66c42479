"""A request on its way through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import insitu
from insitu_engine.messages import Sampling


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One prompt and what has become of it. The scheduler owns every field below `num_computed`."""

    name: str
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_ids: frozenset[int] = frozenset()
    """Token ids that end the output; empty where end-of-text is ignored."""
    capture: bool = False
    """Opted in to raw rows."""
    trace: insitu.RequestContext = field(default_factory=insitu.RequestContext)

    num_computed: int = 0
    """Positions whose keys and values are in the cache, as far as completed steps go."""
    output: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    """Micro-batch slot it is pinned to, -1 while it waits."""
    aborted: bool = False
    starved: bool = False
    """Had a place and no KV blocks at least once."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def most_positions(self) -> int:
        """Positions the cache may have to hold: the last token is sampled, never computed."""
        return len(self.prompt) + self.max_tokens - 1

    def tokens(self, start: int, count: int) -> list[int]:
        """Return token ids `start .. start + count - 1` of prompt and output together."""
        num_prompt = len(self.prompt)
        if start >= num_prompt:
            return self.output[start - num_prompt : start - num_prompt + count]
        found = list(self.prompt[start : start + count])
        return found + self.output[: count - len(found)]
