"""What a cast to fewer bits would cost: the error of bfloat16, and of float8 with a scale, on a sample of the values.

Rounding to float8 is done in float32 arithmetic, which is some ten times as fast on a host as torch's casts and gives
the same: to a value is added, and taken away again, a number so large that float32 has no lower bits there than float8.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from insitu.statistics import layout

_LARGEST_SCALE: Final = 2.0**127
"""Where the largest magnitude is so small that its scale is beyond float32."""


class Float8(NamedTuple):
    """A format with fewer than eight bits of mantissa."""

    mantissa_bits: int
    lowest_exponent: int
    """Of a normal number."""
    largest: float


FORMATS: Final = (Float8(3, -6, layout.E4M3[1]), Float8(2, -14, layout.E5M2[1]))
"""Of `layout.CASTS` those after bfloat16."""


def formats(device: torch.device) -> Tensor:
    """Return what `cast_errors` has to know of the formats, float32[3, formats, 1, 1, 1]."""
    rows = [
        (
            each.largest,
            2.0**each.lowest_exponent,
            1.5 * 2.0 ** (23 - each.mantissa_bits),
        )
        for each in FORMATS
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device).t().reshape(3, len(FORMATS), 1, 1, 1)


def rounded(x: Tensor, known: Tensor) -> Tensor:
    """Return float32 x [formats, ...], none of it larger than the format's largest, as each format holds it."""
    _, lowest, rough = known
    binade = (x.view(torch.int32) & layout.INF_BITS).view(torch.float32)  # the power of two at or below x
    large = torch.maximum(binade, lowest).mul_(rough)
    return (x + large).sub_(large)


def sample_of(x: Tensor) -> Tensor:
    """Return float32 rows of x [sites, rows, width] that lie evenly: at most `CAST_VALUES` of all, or a row each."""
    num_rows = max(1, layout.CAST_VALUES // (x.shape[0] * x.shape[2]))
    return torch.nan_to_num(x[:, :: -(-x.shape[1] // num_rows)].float(), 0.0, 0.0, 0.0)


def cast_errors(x: Tensor, absmax: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values, values that become zero) as int64[sites, 2 x formats] and (noise, signal) as float64, likewise.

    x: a sample, [sites, rows, width]; absmax: float32[sites], of the whole of a site; known: `formats`. Of the integers
    all values come first, then all lost; floats are by format. Squares are of x / absmax in float32: less than
    absmax x 2^-63 is none.
    """
    absmax = absmax[:, None, None]
    unit = torch.where(absmax > 0, 1 / absmax, 1.0).clamp_max_(_LARGEST_SCALE)
    scale = torch.where(absmax > 0, known[0] / absmax, 1.0).clamp_max_(_LARGEST_SCALE)
    scaled = x * scale
    found = rounded(scaled, known)
    noise = _power((scaled - found).mul_(unit / scale))
    signal, noise_of_bf16 = _power(x * unit), _power((x - x.bfloat16().float()) * unit)
    num_zero = _num_zero(x)[None]
    lost = torch.cat([num_zero, _num_zero(found)]) - num_zero  # bfloat16 has the exponents of float32: it loses none
    num = torch.full_like(lost, x[0].numel())
    noises = torch.cat([noise_of_bf16[None], noise])
    values = torch.stack([noises, signal.expand_as(noises)], 2) / unit.double().square().reshape(-1, 1)
    return torch.cat([num, lost]).t(), values.transpose(0, 1).flatten(1)


def _num_zero(x: Tensor) -> Tensor:
    """Return each site's number of zeros, int64: flags of float32 add up fast, and exactly."""
    return torch.eq(x, 0.0, out=torch.empty_like(x)).sum((-2, -1)).long()


def _power(x: Tensor) -> Tensor:
    """Return each site's sum of squares: of a row in float32, of rows in float64."""
    return x.square().sum(-1).double().sum(-1)
