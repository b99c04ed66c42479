"""The statistics of one site in one step, computed where the tensor lies, inside the forward pass (tier T1).

`compute` writes into a fixed place and reads nothing back: no sync, no shape that depends on values, so it traces into
`torch.compile(fullgraph=True)`. It works through the tensor in blocks of rows in memory of its own, made once: what
is allocated beyond that is a few vectors of rows and channels, for logits two blocks. Values are taken as float32 (of
float64, what float32 cannot hold counts as infinite), sums as float64: the fourth power of a large float32 fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final, NamedTuple

import torch
from torch import Tensor

from insitu import statistic_layout as layout

HOST_BLOCK: Final = 1 << 16
"""Elements of a block on the host: its 2.75 MiB of memory stay near the core through all passes."""
DEVICE_BLOCK: Final = 1 << 20
"""Elements of a block on a device: 44 MiB, and few launches for a long prompt."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the statistics of one site go: int64[NUM_INTS] and float64[NUM_FLOATS]."""

    ints: Tensor
    floats: Tensor


class Loaded(NamedTuple):
    """A block of rows in the workspace."""

    bits: Tensor
    """int32 [rows, width]: magnitudes as their float32 bits, which order as they do; 0 where not finite."""
    bad: Tensor
    """bool: not finite."""
    num_nan: Tensor
    exact: Tensor
    """float64, 0 where not finite."""


class Workspace:
    """Memory for one block; every site of a step uses it in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocate(HOST_BLOCK if device.type == "cpu" else DEVICE_BLOCK)

    def fit(self, width: int) -> None:
        """Make room for a row of so many values: once, when a site turns out to be wider than a block."""
        if width > self.size:
            self._allocate(width)

    def _allocate(self, size: int) -> None:
        device = self._device
        with torch.inference_mode(False):
            self.value = torch.empty(size, device=device)
            self.bits = torch.empty(size, dtype=torch.int32, device=device)
            self.below = torch.empty(size, dtype=torch.int32, device=device)
            self.exact = torch.empty(size, dtype=torch.float64, device=device)
            self.power = torch.empty(size, dtype=torch.float64, device=device)
            self.rung = torch.empty(size, dtype=torch.int64, device=device)
            self.ones = torch.ones(size, dtype=torch.int64, device=device)
            self.no_figures = torch.zeros(len(layout.FIGURES), dtype=torch.int64, device=device)
        self.size = size

    def blocks(self, x: Tensor) -> Sequence[Tensor]:
        """Return x [rows, width] in blocks of rows."""
        return torch.split(x, max(1, self.size // x.shape[1]))

    def load(self, block: Tensor) -> Loaded:
        """Take a block in; what was loaded before is gone."""
        value = self._like(block, self.value).copy_(block)
        bits = self._like(block, self.bits)
        torch.bitwise_and(value.view(torch.int32), layout.MAGNITUDE_BITS, out=bits)
        bad = bits >= layout.INF_BITS
        num_nan = (bits > layout.INF_BITS).sum()
        bits.masked_fill_(bad, 0)
        return Loaded(bits, bad, num_nan, self._like(block, self.exact).copy_(value).masked_fill_(bad, 0.0))

    def pair(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Take two blocks of one shape in as float64; what was loaded before is gone."""
        return self._like(first, self.exact).copy_(first), self._like(second, self.power).copy_(second)

    def squares(self, exact: Tensor) -> Tensor:
        """Return the squares of a loaded block."""
        return torch.mul(exact, exact, out=self._like(exact, self.power))

    def rank(self, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many magnitudes are zero, one less than the smallest other bits, and the counts on the ladder."""
        below = torch.sub(bits, 1, out=self._like(bits, self.below))  # a rung has its upper edge; zero turns negative
        num_zero = (below < 0).sum()
        rung = torch.bitwise_right_shift(below, layout.MANTISSA_BITS, out=self._like(bits, self.rung))
        found = torch.zeros(layout.HIGHEST + 1, dtype=torch.int64, device=bits.device)
        found.scatter_add_(0, rung.clamp_(layout.LOWEST, layout.HIGHEST).view(-1), self.ones[: bits.numel()])
        return num_zero, below.bitwise_and_(layout.MAGNITUDE_BITS).amin(), found[layout.LOWEST :]

    @staticmethod
    def _like(block: Tensor, memory: Tensor) -> Tensor:
        return memory[: block.numel()].view(block.shape)


class Look(NamedTuple):
    """What one look at a block tells."""

    num_bad: Tensor
    num_nan: Tensor
    num_zero: Tensor
    first_bad: Tensor
    row_absmax: Tensor
    channel_absmax: Tensor
    smallest: Tensor
    """int32: one less than the bits of the smallest magnitude that is not zero."""
    rungs: Tensor
    total: Tensor
    squares: Tensor


def compute(x: Tensor, place: Place, work: Workspace, *, is_logits: bool = False, source: Tensor | None = None) -> None:
    """Write the statistics of the valid rows x, [rows, width], into their place.

    is_logits: rows are scores of token ids. source: of a residual stream, what the layer read, of the shape of x.
    The workspace fits a row. Raises TypeError for complex numbers.
    """
    if x.is_complex():
        raise TypeError(f"no statistics of {x.dtype}")
    place.ints[layout.ROWS].fill_(x.shape[0])
    if not x.numel():
        place.ints[layout.ROWS + 1 :].zero_()
        place.floats.zero_()
        return
    _compute_values(x, place, work)
    if is_logits:
        _write_figures(layout.LOGITS, [_confidence(block) for block in work.blocks(x)], place)
    if source is not None:
        pairs = zip(work.blocks(x), work.blocks(source), strict=True)
        _write_figures(layout.RESIDUAL, [_change(*work.pair(*pair)) for pair in pairs], place)


def _compute_values(x: Tensor, place: Place, work: Workspace) -> None:
    blocks, looks = work.blocks(x), []
    first = 0
    for block in blocks:
        loaded = work.load(block)
        looks.append(_look(loaded, first, work))
        first += block.shape[0]
    look = reduce(_join, looks)
    num = (x.numel() - look.num_bad).clamp_min(1)
    mean, rms = look.total / num, (look.squares / num).sqrt()
    if len(blocks) == 1:
        counts, sums = _spread(loaded, mean, rms, work)
    else:
        spreads = [_spread(work.load(block), mean, rms, work) for block in blocks]
        counts, sums = (reduce(torch.add, each) for each in zip(*spreads, strict=True))
    channels, sizes = _largest_channels(look.channel_absmax)
    row = look.row_absmax.argmax()
    found = torch.stack([look.num_bad, look.num_nan, look.num_zero, look.first_bad, row])
    place.ints[layout.ROWS + 1 :].copy_(torch.cat([found, counts, channels, work.no_figures, look.rungs]))
    smallest = (look.smallest + 1).view(torch.float32)
    place.floats[: layout.FIGURE.start].copy_(torch.cat([torch.stack([smallest.double(), mean]), sums, sizes.double()]))


def _look(loaded: Loaded, first_row: int, work: Workspace) -> Look:
    """Look at a block whose first row is row `first_row` of the tensor."""
    bits, bad, num_nan, exact = loaded
    num_zero, smallest, rungs = work.rank(bits)
    magnitude = bits.view(torch.float32)
    row = torch.arange(first_row, first_row + bits.shape[0], device=bits.device)
    return Look(
        bad.sum(),
        num_nan,
        num_zero,
        torch.where(bad.any(1), row, layout.NO_ROW).min(),
        magnitude.amax(1),
        magnitude.amax(0),
        smallest,
        rungs,
        exact.sum(),
        work.squares(exact).sum(),
    )


def _join(a: Look, b: Look) -> Look:
    """Return what looks at a block and at the one after it tell together."""
    return Look(
        a.num_bad + b.num_bad,
        a.num_nan + b.num_nan,
        a.num_zero + b.num_zero,
        torch.minimum(a.first_bad, b.first_bad),
        torch.cat([a.row_absmax, b.row_absmax]),
        torch.maximum(a.channel_absmax, b.channel_absmax),
        torch.minimum(a.smallest, b.smallest),
        a.rungs + b.rungs,
        a.total + b.total,
        a.squares + b.squares,
    )


def _spread(loaded: Loaded, mean: Tensor, rms: Tensor, work: Workspace) -> tuple[Tensor, Tensor]:
    """Return (outliers, nearly zeros) as int64[2] and the sums of powers 2, 3, 4 of the deviations as float64[3]."""
    magnitude = loaded.bits.view(torch.float32)
    counts = [(magnitude > layout.OUTLIER_RMS * rms).sum(), (magnitude <= layout.NEAR_ZERO_RMS * rms).sum()]
    deviation = loaded.exact.sub_(mean).masked_fill_(loaded.bad, 0.0)
    power = work.squares(deviation)
    sums = [power.sum(), power.mul_(deviation).sum(), power.mul_(deviation).sum()]
    return torch.stack(counts), torch.stack(sums)


def _largest_channels(channel_absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places in a row with the largest magnitudes, and these, of NUM_CHANNELS; -1 where there are fewer."""
    missing = max(0, layout.NUM_CHANNELS - channel_absmax.shape[0])
    sizes, channels = channel_absmax.topk(layout.NUM_CHANNELS - missing)
    if missing:
        channels = torch.nn.functional.pad(channels, (0, missing), value=layout.NO_CHANNEL)
        sizes = torch.nn.functional.pad(sizes, (0, missing))
    return channels, sizes


def _confidence(block: Tensor) -> Tensor:
    """Return entropy (nats), largest probability, its distance to the second, mass of the top ids, log-sum-exp.

    float32[5, rows]. A row with NaN or +inf, or with nothing but -inf, has no finite figure.
    """
    scores = block.float()
    chance = scores.softmax(1)
    top = chance.topk(min(layout.TOP_K, block.shape[1]), 1).values
    second = top[:, 1] if top.shape[1] > 1 else torch.zeros_like(top[:, 0])
    entropy = torch.special.entr(chance).sum(1)
    return torch.stack([entropy, top[:, 0], top[:, 0] - second, top.sum(1), scores.logsumexp(1)])


def _change(after: Tensor, before: Tensor) -> Tensor:
    """Return rms(after) / rms(before) and the cosine between both, float64[2, rows]; overwrites `after`."""
    length, length_before = (torch.linalg.vector_norm(each, dim=1) for each in (after, before))
    return torch.stack([length / length_before, after.mul_(before).sum(1) / (length * length_before)])


def _write_figures(at: slice, parts: list[Tensor], place: Place) -> None:
    """Write count, mean, squared deviations, least and greatest of [figures, rows]; what is not finite is left out."""
    figures = torch.cat(parts, 1).double()
    missing = ~figures.isfinite()
    num = figures.shape[1] - missing.sum(1)
    values = figures.masked_fill(missing, 0.0)
    mean = values.sum(1) / num.clamp_min(1)
    apart = (values - mean[:, None]).masked_fill_(missing, 0.0)
    low = figures.masked_fill(missing, torch.inf).amin(1)
    high = figures.masked_fill(missing, -torch.inf).amax(1)
    place.ints[layout.FIGURE_NUM][at].copy_(num)
    told = torch.stack([mean, apart.square().sum(1), low, high], 1)
    place.floats[layout.FIGURE].view(-1, 4)[at].copy_(told)
