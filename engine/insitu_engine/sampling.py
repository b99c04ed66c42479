"""From logits to token ids. Stateless: a token depends on its logits, its request's seed and its position alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from insitu_engine.messages import NOT_FINITE, RowPlan, Sampling

_MIX = 0x9E3779B97F4A7C15


def sample(logits: torch.Tensor, rows: Sequence[RowPlan]) -> list[int]:
    """Return one token id a row of logits, NOT_FINITE for a row that holds NaN or infinity.

    logits: [num_samples, vocab]; rows: the rows that sample, in order of `sample_row`.
    """
    if not rows:
        return []
    best = logits.argmax(-1).tolist()
    # A sum is not finite when any element is, and far cheaper than looking at each.
    finite = torch.isfinite(logits.sum(-1, dtype=torch.float32)).tolist()
    ids = []
    for at, row in enumerate(rows):
        if not finite[at] and not bool(torch.isfinite(logits[at]).all()):
            ids.append(NOT_FINITE)
        elif row.sampling.temperature == 0:
            ids.append(best[at])
        else:
            ids.append(_draw(logits[at], row.sampling, row.position + row.count))
    return ids


def _draw(logits: torch.Tensor, how: Sampling, position: int) -> int:
    """Draw one id from softmax(logits / temperature), cut to the top k and then the top p."""
    ordered, ids = torch.sort(logits.float().cpu() / how.temperature, descending=True)
    if how.top_k:
        ordered = ordered[: how.top_k]
    sums = ordered.softmax(-1).cumsum(-1)
    if how.top_p < 1:
        kept = int(torch.searchsorted(sums, how.top_p)) + 1
        sums = sums[:kept]
    generator = torch.Generator().manual_seed((how.seed * _MIX + position) % (1 << 63))
    point = torch.rand((), generator=generator) * sums[-1]
    at = min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
    return int(ids[at])
