"""Row maps: whose rows a step of vLLM ran, from what its runner had prepared. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from insitu.session.row_map import Rows
from insitu.vllm.asked import Asked

NOTHING: Final = Asked()


def row_map(
    requests: Sequence[str],
    starts: Sequence[int],
    computed: Sequence[int],
    num_prompt: Sequence[int],
    asked: Mapping[str, Asked],
) -> list[Rows]:
    """Return whose rows these are, in the runner's order of requests.

    starts: where each request's rows begin, and where the last one's end. computed: positions of each that earlier
    steps or the prefix cache have computed, so the position of its first row. num_prompt: tokens of its prompt.
    vLLM computes logits of each request's last row, in the same order, whether or not it samples there.
    """
    found = []
    for at, name in enumerate(requests):
        first, count = int(starts[at]), int(starts[at + 1] - starts[at])
        position, of_request = int(computed[at]), asked.get(name, NOTHING)
        is_decode = count == 1 and position >= num_prompt[at]
        found.append(
            Rows(
                name,
                start=first,
                count=count,
                position=position,
                phase="decode" if is_decode else "prefill",
                sample_row=at,
                capture=of_request.capture,
                trace=of_request.trace,
            )
        )
    return found
