"""Which layers each stage gets: contiguous ranges whose costliest stage is as cheap as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from insitu_engine.errors import EngineError


def balanced(layer_costs: Sequence[int], head_cost: int, num_stages: int) -> tuple[int, ...]:
    """Return how many layers each stage gets so that the largest stage cost is least.

    layer_costs: cost of each layer in any unit (bytes of parameters here); head_cost: what the last stage carries
    besides. Ties go to the split whose costs are most even, then to more layers in front. Raises EngineError for
    more stages than layers.
    """
    num_layers = len(layer_costs)
    check_stages(num_stages, num_layers)
    total = [0]
    for cost in layer_costs:
        total.append(total[-1] + cost)
    # best[k] = (largest cost, sum of squares, counts) of the cheapest split of the first k layers so far
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(num_stages):
        extra = head_cost if stage == num_stages - 1 else 0
        best = {
            end: min(
                (max(high, cost), squares + cost * cost, (*counts, end - begin))
                for begin, (high, squares, counts) in best.items()
                if begin < end
                for cost in (total[end] - total[begin] + extra,)
            )
            for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1)
        }
    return best[num_layers][2]


def checked(split: Sequence[int], num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return a split given by hand. Raises EngineError when it does not cover the layers with the stages."""
    check_stages(num_stages, num_layers)
    text = ",".join(map(str, split))
    if len(split) != num_stages or min(split) < 1 or sum(split) != num_layers:
        raise EngineError(
            f"--split {text} does not fit: it needs {num_stages} numbers of at least 1 that sum to {num_layers} layers"
        )
    return tuple(split)


def check_stages(num_stages: int, num_layers: int) -> None:
    """Raise EngineError for a number of stages the layers cannot fill."""
    if not 1 <= num_stages <= num_layers:
        raise EngineError(
            f"--stages {num_stages} is not possible: the model has {num_layers} layers and each stage needs one; "
            f"use --stages 1..{num_layers}"
        )


def ranges(split: Sequence[int]) -> tuple[range, ...]:
    """Return the global layer indices of each stage."""
    ends = [0]
    for count in split:
        ends.append(ends[-1] + count)
    return tuple(range(begin, end) for begin, end in pairwise(ends))
