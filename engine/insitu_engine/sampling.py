"""From logits to token ids. Stateless: a token depends on its logits, its request's seed and its position alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from insitu_engine.messages import NOT_FINITE, RowPlan, Sampling


def sample(logits: torch.Tensor, rows: Sequence[RowPlan]) -> list[int]:
    """Return one token id a row of logits, NOT_FINITE for a row that holds NaN or infinity.

    logits: [num_samples, vocab]; rows: the rows that sample, in order of `sample_row`.
    """
    if not rows:
        return []
    ids: list[int] = logits.argmax(-1).tolist()
    drawn = [at for at, row in enumerate(rows) if row.sampling.temperature > 0]
    # One not finite element makes the sum so; a sum that overflowed without one is looked at again.
    suspects = torch.isfinite(logits.sum(-1, dtype=torch.float32)).logical_not().nonzero().flatten().tolist()
    lost = {at for at in suspects if not bool(torch.isfinite(logits[at]).all())}
    drawn = [at for at in drawn if at not in lost]
    if drawn:
        for at, token in zip(drawn, _draw(logits[drawn], [rows[at] for at in drawn]), strict=True):
            ids[at] = token
    return [NOT_FINITE if at in lost else token for at, token in enumerate(ids)]


def _draw(logits: torch.Tensor, rows: Sequence[RowPlan]) -> list[int]:
    """Draw one id a row from softmax(logits / temperature), cut to the top k and then the top p."""
    temperatures = torch.tensor([row.sampling.temperature for row in rows])
    scaled = logits.float().cpu() / temperatures[:, None]
    for at, row in enumerate(rows):
        if row.sampling.top_k or row.sampling.top_p < 1:
            scaled[at] = _cut(scaled[at], row.sampling)
    sums = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    shares = torch.tensor([_share(row.sampling.seed, row.position + row.count) for row in rows], dtype=torch.float64)
    points = torch.minimum(shares[:, None] * sums[:, -1:], sums[:, -1:].nextafter(torch.zeros(())))
    found: list[int] = torch.searchsorted(sums, points, right=True).flatten().tolist()
    return found


def _cut(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Return logits [vocab] with minus infinity where the top k or the top p leave a token out."""
    ordered, ids = torch.sort(logits, descending=True, stable=True)
    num_kept = how.top_k or len(ordered)
    if how.top_p < 1:
        sums = ordered[:num_kept].softmax(-1).cumsum(-1)
        num_kept = min(num_kept, int(torch.searchsorted(sums, how.top_p)) + 1)
    kept = ids[:num_kept]
    return torch.full_like(logits, float("-inf")).index_copy_(0, kept, logits[kept])


def _share(seed: int, position: int) -> float:
    """Return a number in [0, 1) that seed and position fix."""
    digest = hashlib.blake2b(b"%d:%d" % (seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
