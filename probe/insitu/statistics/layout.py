"""Where a site's statistics lie in memory, and what they count: what the device and the drain agree on. Pure.

The place of one site in one step is int64[NUM_INTS] and float64[NUM_FLOATS]. Magnitudes are counted on a ladder: the
top bits of a positive float32 (exponent and two bits of mantissa) number its quarter of an octave, and every threshold
that is counted is a rung. Rung j holds what is larger than its lower edge and at most its upper edge.
"""

from __future__ import annotations

from typing import Final

NUM_OCTAVES: Final = 32
FIRST_OCTAVE: Final = -16
"""Octave i of the histogram holds 2^(FIRST_OCTAVE + i) < |x| <= twice that; what lies outside is in the outermost."""
NUM_CHANNELS: Final = 8
"""Channels (places in a row) that are named, the largest magnitudes first: few channels hold most outliers."""
OUTLIER_RMS: Final = 6.0
"""An outlier is larger than so many times the root mean square of its tensor."""
BEYOND: Final = 6.0
"""The absolute threshold of LLM.int8() (Dettmers et al., 2022): beyond it a value is kept out of int8."""
NEAR_ZERO_RMS: Final = 1e-3
"""At most so many times the root mean square is nearly zero; zeros are among them."""
TOP_K: Final = 10
"""Token ids whose probabilities make `topk_mass`."""
E4M3: Final = (2.0**-10, 448.0)
E5M2: Final = (2.0**-17, 57344.0)
"""Of float8 formats: the largest magnitude that a cast rounds to zero, and the largest finite number."""

FIGURES: Final = ("entropy", "top1", "margin", "topk_mass", "logsumexp", "top_id", "residual_ratio", "residual_cosine")
"""Figures that each row has; over rows they are kept as count, mean, sum of squared deviations, least and greatest."""
SCORES: Final = slice(0, 6)
"""Those of rows that are scores: of token ids, or of a router's experts."""
RESIDUAL: Final = slice(6, 8)

CASTS: Final = ("bf16", "e4m3", "e5m2")
"""Formats of which the error of a cast is taken: bfloat16, and float8 scaled so that the largest magnitude fits."""
CAST_VALUES: Final = 1 << 14
"""Values of which casts are tried, in rows that lie evenly, of all tensors that are measured together: a sample."""

MANTISSA_BITS: Final = 21
"""Bits of a float32 below the ladder's."""
INF_BITS: Final = 0x7F800000
MAGNITUDE_BITS: Final = 0x7FFFFFFF
LOWEST: Final = (127 - 17) * 4 - 1
"""Rung of all that is at most 2^-17, the smallest threshold: (biased exponent, mantissa quarter) as one number."""
HIGHEST: Final = (127 + 15) * 4 + 3
"""Rung of all that is larger than 57344 = 1.75 x 2^15, the largest threshold."""
NUM_RUNGS: Final = HIGHEST - LOWEST + 1

STAMP, ROWS, BAD, NAN, ZERO, FIRST_BAD, ABSMAX_ROW, OUTLIER, NEAR_ZERO = range(9)
"""int64: the step that wrote it (C4), rows, values not finite, NaN; zeros and nearly zeros with those not finite.

`reductions.compute` writes a place front to back: this order is its."""
CHANNEL: Final = slice(9, 9 + NUM_CHANNELS)
FIGURE_NUM: Final = slice(CHANNEL.stop, CHANNEL.stop + len(FIGURES))
CAST_NUM: Final = slice(FIGURE_NUM.stop, FIGURE_NUM.stop + len(CASTS))
CAST_LOST: Final = slice(CAST_NUM.stop, CAST_NUM.stop + len(CASTS))
"""Values that were cast; those of them that are not zero and become it."""
RUNG: Final = slice(CAST_LOST.stop, CAST_LOST.stop + NUM_RUNGS)
CHECKSUM: Final = RUNG.stop
"""Of the bits of all values, where a site is compared between ranks; written by itself, before the rest."""
NUM_INTS: Final = CHECKSUM + 1
NO_CHECKSUM: Final = 0
NO_ROW: Final = 1 << 40
"""First bad row of a tensor that has none; larger than any row."""
NO_CHANNEL: Final = -1

SMALLEST: Final = 0
"""float64: the smallest magnitude but zero, where there is one; then mean and central sums of powers 2, 3 and 4."""
MOMENTS: Final = slice(1, 5)
CHANNEL_ABSMAX: Final = slice(5, 5 + NUM_CHANNELS)
FIGURE: Final = slice(CHANNEL_ABSMAX.stop, CHANNEL_ABSMAX.stop + 4 * len(FIGURES))
CAST: Final = slice(FIGURE.stop, FIGURE.stop + 2 * len(CASTS))
"""By format: sum of squared errors of the cast, sum of squares of what was cast."""
NUM_FLOATS: Final = CAST.stop
