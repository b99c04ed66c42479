"""The statistics of sites in one step, computed where the tensors lie, inside the step (tier T1).

`compute` writes into fixed places and reads nothing back: no sync, no shape that depends on values, so it traces into
`torch.compile(fullgraph=True)`. Sites of one shape go through every operation together, for what small tensors cost is
calls; a large one goes in blocks of rows. Memory is a workspace made once: what is allocated beyond it is a few vectors
of rows and channels, and for figures of rows a block or two. Values are taken as float32 (of float64, what float32
cannot hold counts as infinite), sums as float64: the fourth power of a large float32 fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from insitu.statistics import layout
from insitu.statistics.casts import cast_errors, sample_of
from insitu.statistics.checksums import checksum
from insitu.statistics.workspace import Workspace


@lru_cache(maxsize=256)
def index_of(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Return rows as int64 on a device; the same sites are measured together again and again."""
    with torch.inference_mode(False):
        found = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        return found.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the statistics of some sites go: rows of int64[n, NUM_INTS] and of float64[n, NUM_FLOATS]."""

    ints: Tensor
    floats: Tensor
    rows: Tensor
    """int64: of each site its row."""

    def write(self, ints: Tensor, floats: Tensor) -> None:
        """Write all but the checksums."""
        self.ints[:, : layout.CHECKSUM].index_copy_(0, self.rows, ints)
        self.floats.index_copy_(0, self.rows, floats)

    def write_checksum(self, value: Tensor) -> None:
        """Write the checksum, int64[], of the one site."""
        self.ints[:, layout.CHECKSUM].index_copy_(0, self.rows, value[None])


class Look(NamedTuple):
    """What one look at a block tells, by site."""

    num_finite: Tensor
    """float32 [sites, rows]."""
    row_absmax: Tensor
    channel_absmax: Tensor
    num_nan: Tensor
    num_zero: Tensor
    """What is not finite counts as zero."""
    smallest: Tensor
    """int32: one less than the bits of the smallest magnitude that is not zero."""
    rungs: Tensor
    moments: Tensor
    """float64 [sites, 5]: finite values, their mean, sums of the powers 2, 3 and 4 of their deviations from it."""


def compute(
    x: Tensor,
    places: Places,
    work: Workspace,
    step: Tensor,
    *,
    has_scores: bool = False,
    source: Tensor | None = None,
    sourced: Sequence[int] = (),
) -> None:
    """Write the statistics of the valid rows x, [sites, rows, width], into their places.

    step: int64[], the stamp. has_scores: rows are scores of token ids, or of experts. source: what the layers read that
    returned x[sourced], of the shape of that: of a residual stream. The workspace fits a row. Raises TypeError for
    complex numbers.
    """
    if x.is_complex():
        raise TypeError(f"no statistics of {x.dtype}")
    num_sites, num_rows, _ = x.shape
    head = torch.stack([step, torch.full_like(step, num_rows)]).expand(num_sites, 2)
    if not x.numel():
        rest = head.new_zeros(num_sites, layout.CHECKSUM - 2)
        places.write(torch.cat([head, rest], 1), places.floats.new_zeros(num_sites, layout.NUM_FLOATS))
        return
    look, (num_outliers, num_near_zero) = _values(x, work)
    num, figures = _figures(x, work, has_scores, source, sourced)
    cast, noise = cast_errors(sample_of(x), look.row_absmax.amax(1), work.formats)
    counts = torch.stack([*_counts(look, x.shape[2]), num_outliers, num_near_zero], 1)
    channels, sizes = _largest_channels(look.channel_absmax)
    smallest = (look.smallest + 1).view(torch.float32).double()[:, None]
    places.write(
        torch.cat([head, counts, channels, num, cast, look.rungs], 1),
        torch.cat([smallest, look.moments[:, 1:], sizes.double(), figures.flatten(1), noise], 1),
    )


def compute_checksum(x: Tensor, places: Places, work: Workspace) -> None:
    """Write the checksum of the values of one site, x [1, rows, width], as float32."""
    parts = [checksum(work.load(block)) for block in work.blocks(x)] if x.numel() else [places.rows.new_zeros(())]
    places.write_checksum(torch.stack(parts).sum())


def _values(x: Tensor, work: Workspace) -> tuple[Look, tuple[Tensor, Tensor]]:
    """Look at all values; then count outliers and nearly zeros, for which the root mean square has to be known."""
    blocks = work.blocks(x)
    looks = []
    for block in blocks:
        value = work.load(block)
        magnitude = work.magnitudes(value)
        looks.append(_look(value, magnitude, work))
    if len(blocks) == 1:
        return looks[0], _beside_rms(magnitude, _rms(looks[0]), work)
    look = _joined(looks)
    rms = _rms(look)
    counts = [_beside_rms(_finite(work.magnitudes(work.load(block))), rms, work) for block in blocks]
    outliers, near_zeros = zip(*counts, strict=True)
    return look, (torch.stack(outliers).sum(0), torch.stack(near_zeros).sum(0))


def _finite(x: Tensor) -> Tensor:
    """Make zero, in place, what is not finite."""
    return x.nan_to_num_(0.0, 0.0, 0.0)


def _look(value: Tensor, magnitude: Tensor, work: Workspace) -> Look:
    """Look at a block; what is not finite becomes zero in `magnitude`."""
    flag = work.flag(magnitude)
    num_finite = torch.lt(magnitude, torch.inf, out=flag).sum(2)
    num_nan = torch.ne(magnitude, magnitude, out=flag).sum((1, 2))
    num_zero = torch.eq(_finite(magnitude), 0.0, out=flag).sum((1, 2))
    below = work.below(magnitude)
    rungs = work.tally(below)
    return Look(
        num_finite,
        magnitude.amax(2),
        magnitude.amax(1),
        num_nan,
        num_zero,
        below.bitwise_and_(layout.MAGNITUDE_BITS).amin((1, 2)),
        rungs,
        _moments(value, num_finite.double().sum(1), work),
    )


def _moments(value: Tensor, num: Tensor, work: Workspace) -> Tensor:
    """Return the moments of the finite values of a block, num of them a site: see `Look`."""
    exact, power = work.exact(value), work.power(value)
    total = torch.nan_to_num(exact, 0.0, 0.0, 0.0, out=power).sum((1, 2))
    mean = total / num.clamp_min(1)
    deviation = _finite(exact.sub_(mean[:, None, None]))
    sums = [torch.mul(deviation, deviation, out=power).sum((1, 2))]
    sums += [power.mul_(deviation).sum((1, 2)) for _ in range(2)]
    return torch.stack([num, mean, *sums], 1)


def _rms(look: Look) -> Tensor:
    num, mean, squares = look.moments[:, :3].unbind(1)
    return (squares / num.clamp_min(1) + mean.square()).sqrt()


def _beside_rms(magnitude: Tensor, rms: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Return how many finite magnitudes are outliers, and how many nearly zero, by site."""
    flag = work.flag(magnitude)
    high, low = (times * rms.float()[:, None, None] for times in (layout.OUTLIER_RMS, layout.NEAR_ZERO_RMS))
    outliers = torch.gt(magnitude, high, out=flag).sum((1, 2)).long()
    return outliers, torch.le(magnitude, low, out=flag).sum((1, 2)).long()


def _joined(looks: Sequence[Look]) -> Look:
    """Return what looks at blocks of rows, one after the other, tell together."""
    num_finite, row_absmax, channel_absmax, nan, zero, smallest, rungs, moments = zip(*looks, strict=True)
    return Look(
        torch.cat(num_finite, 1),
        torch.cat(row_absmax, 1),
        torch.stack(channel_absmax).amax(0),
        torch.stack(nan).long().sum(0),
        torch.stack(zero).long().sum(0),
        torch.stack(smallest).amin(0),
        torch.stack(rungs).sum(0),
        _joined_moments(torch.stack(moments)),
    )


def _joined_moments(moments: Tensor) -> Tensor:
    """Return the moments of blocks [blocks, sites, 5] about their common mean: `parts._combine_moments`."""
    num, mean, m2, m3, m4 = moments.unbind(2)
    together = (num * mean).sum(0) / num.sum(0).clamp_min(1)
    d = torch.where(num > 0, mean - together, 0.0)
    m4 = m4 + 4 * d * m3 + 6 * d**2 * m2 + num * d**4
    m3 = m3 + 3 * d * m2 + num * d**3
    m2 = m2 + num * d**2
    return torch.stack([num.sum(0), together, *(each.sum(0) for each in (m2, m3, m4))], 1)


def _counts(look: Look, width: int) -> list[Tensor]:
    """Return of each site what is not finite, NaN, zero, and the rows of the first bad and of the largest value."""
    num_rows = look.num_finite.shape[1]
    row = torch.arange(num_rows, device=look.num_finite.device)
    first_bad = torch.where(look.num_finite < width, row, layout.NO_ROW).amin(1)
    num_bad = num_rows * width - look.moments[:, 0].long()
    return [num_bad, look.num_nan.long(), look.num_zero.long(), first_bad, look.row_absmax.argmax(1)]


def _largest_channels(channel_absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places in a row with the largest magnitudes, and these, of NUM_CHANNELS; -1 where there are fewer."""
    missing = max(0, layout.NUM_CHANNELS - channel_absmax.shape[1])
    sizes, channels = channel_absmax.topk(layout.NUM_CHANNELS - missing)
    if missing:
        channels = torch.nn.functional.pad(channels, (0, missing), value=layout.NO_CHANNEL)
        sizes = torch.nn.functional.pad(sizes, (0, missing))
    return channels, sizes


def _figures(
    x: Tensor, work: Workspace, has_scores: bool, source: Tensor | None, sourced: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return in how many rows each figure is finite, int64[sites, figures], and what `_told_of` says of them."""
    num = torch.zeros(x.shape[0], len(layout.FIGURES), dtype=torch.int64, device=x.device)
    told = torch.zeros(*num.shape, 4, dtype=torch.float64, device=x.device)
    if has_scores:
        found = torch.cat([_confidence(block) for block in work.blocks(x)], 2)
        num[:, layout.SCORES], told[:, layout.SCORES] = _told_of(found.double())
    if source is not None:
        at, pairs = _index(sourced, x.device), zip(work.blocks(x), work.blocks(source), strict=True)
        found = torch.cat([_change(block[at], before, work) for block, before in pairs], 2)
        num[at, layout.RESIDUAL], told[at, layout.RESIDUAL] = _told_of(found)
    return num, told


def _index(sites: Sequence[int], device: torch.device) -> slice | list[int] | Tensor:
    """Return what takes some sites out of a tensor: a slice where they lie evenly, so that nothing is copied.

    On a device the others are told by a tensor that is there already: a list would be copied, and waited for.
    """
    every = sites[1] - sites[0] if len(sites) > 1 else 1
    even = range(sites[0], sites[-1] + 1, every)
    if list(even) == list(sites):
        return slice(even.start, even.stop, every)
    return list(sites) if device.type == "cpu" else index_of(tuple(sites), device)


def _confidence(block: Tensor) -> Tensor:
    """Return entropy (nats), largest probability, its distance to the second, mass of the top ids, log-sum-exp, top id.

    float32[6, sites, rows]. A row with NaN or +inf, or with nothing but -inf, has no finite figure.
    """
    scores = block.float()
    chance = scores.softmax(2)
    top, ids = chance.topk(min(layout.TOP_K, block.shape[2]), 2)
    first = top[..., 0]
    second = top[..., 1] if top.shape[2] > 1 else torch.zeros_like(first)
    entropy = torch.special.entr(chance).sum(2)
    top_id = torch.where(first.isfinite(), ids[..., 0].float(), torch.nan)
    return torch.stack([entropy, first, first - second, top.sum(2), scores.logsumexp(2), top_id])


def _change(after: Tensor, before: Tensor, work: Workspace) -> Tensor:
    """Return rms(after) / rms(before) and the cosine between both, float64[2, sites, rows]."""
    exact, other = work.exact(after), work.power(before).copy_(before)
    length, length_before = (torch.linalg.vector_norm(each, dim=2) for each in (exact, other))
    return torch.stack([length / length_before, exact.mul_(other).sum(2) / (length * length_before)])


def _told_of(figures: Tensor) -> tuple[Tensor, Tensor]:
    """Return of figures [figures, sites, rows] how many are finite, int64[sites, figures], and of those float64[sites,
    figures, 4]: mean, squared deviations, least and greatest."""
    missing = ~figures.isfinite()
    num = figures.shape[2] - missing.sum(2)
    values = figures.masked_fill(missing, 0.0)
    mean = values.sum(2) / num.clamp_min(1)
    apart = (values - mean[..., None]).masked_fill_(missing, 0.0)
    low = figures.masked_fill(missing, torch.inf).amin(2)
    high = figures.masked_fill(missing, -torch.inf).amax(2)
    told = torch.stack([mean, apart.square().sum(2), low, high], 2)
    return num.t(), told.transpose(0, 1)
