"""Memory in which statistics are computed, made once and used by all sites in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from insitu.statistics import layout
from insitu.statistics.casts import formats

HOST_BLOCK: Final = 1 << 17
"""Elements of a block on the host: its 4 MiB of memory stay near the core, and sites of a wide model find company."""
DEVICE_BLOCK: Final = 1 << 20
"""Elements of a block on a device: 36 MiB, and few launches for a long prompt."""
ELEMENT_BYTES: Final = 32
"""What an element of a block takes of memory."""
MAX_WIDTH: Final = 1 << 24
"""Values of a row; more cannot be counted in float32."""


class Workspace:
    """Memory for one block of [sites, rows, width]."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._allocate(HOST_BLOCK if device.type == "cpu" else DEVICE_BLOCK)

    def fit(self, width: int) -> None:
        """Make room for a row of so many values: once, when a site turns out to be wider than a block.

        Raises ValueError for a row that is too wide.
        """
        if width > MAX_WIDTH:
            raise ValueError(f"rows of {width} values; at most {MAX_WIDTH} can be counted")
        if width > self.size:
            self._allocate(width)

    def _allocate(self, size: int) -> None:
        device = self.device
        with torch.inference_mode(False):
            self._value = torch.empty(size, dtype=torch.float32, device=device)
            self._magnitude = torch.empty(size, dtype=torch.float32, device=device)
            self._flag = torch.empty(size, dtype=torch.float32, device=device)
            self._below = torch.empty(size, dtype=torch.int32, device=device)
            self._exact = torch.empty(size, dtype=torch.float64, device=device)
            self._power = torch.empty(size, dtype=torch.float64, device=device)
            self._one = torch.ones(1, dtype=torch.int64, device=device)
            self.formats = formats(device)
        self.size = size

    def blocks(self, x: Tensor) -> Sequence[Tensor]:
        """Return x [sites, rows, width] in blocks of rows."""
        return torch.split(x, max(1, self.size // (x.shape[0] * x.shape[2])), 1)

    def load(self, block: Tensor) -> Tensor:
        """Return the block as float32; what was loaded before may be gone."""
        is_ready = block.dtype is torch.float32 and block.is_contiguous()
        return block if is_ready else self._like(block, self._value).copy_(block)

    def magnitudes(self, value: Tensor) -> Tensor:
        """Return the magnitudes of a loaded block; what this returned before is gone."""
        return torch.abs(value, out=self._like(value, self._magnitude))

    def exact(self, block: Tensor) -> Tensor:
        """Return a block as float64; what this returned before is gone."""
        return self._like(block, self._exact).copy_(block)

    def power(self, block: Tensor) -> Tensor:
        """Return memory for float64 as much as the block."""
        return self._like(block, self._power)

    def flag(self, block: Tensor) -> Tensor:
        """Return memory for float32 as much as the block: comparisons write 1.0 and 0.0, which add up fast."""
        return self._like(block, self._flag)

    def below(self, magnitude: Tensor) -> Tensor:
        """Return one less than the bits of magnitudes, int32: so a rung has its upper edge, and zero turns negative."""
        return torch.sub(magnitude.view(torch.int32), 1, out=self._like(magnitude, self._below))

    def tally(self, below: Tensor) -> Tensor:
        """Return how many magnitudes are on each rung, int64[sites, NUM_RUNGS]; overwrites what `flag` returned."""
        rung = torch.clamp(
            below,
            layout.LOWEST << layout.MANTISSA_BITS,
            layout.HIGHEST << layout.MANTISSA_BITS,
            out=self.flag(below).view(torch.int32),
        ).bitwise_right_shift_(layout.MANTISSA_BITS)
        num_sites = rung.shape[0]
        first = torch.arange(num_sites, dtype=torch.int32, device=rung.device)[:, None, None] * layout.NUM_RUNGS
        place = rung.add_(first - layout.LOWEST).view(-1)
        num = num_sites * layout.NUM_RUNGS
        if rung.is_cuda or torch.compiler.is_compiling():
            found = torch.zeros(num, dtype=torch.int64, device=rung.device)
            found.scatter_add_(0, place.to(torch.int64), self._one.expand(place.shape))
        else:
            found = torch.bincount(place, minlength=num)
        return found.view(num_sites, layout.NUM_RUNGS)

    @staticmethod
    def _like(block: Tensor, memory: Tensor) -> Tensor:
        return memory[: block.numel()].view(block.shape)
