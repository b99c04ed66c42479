"""The kernel of fused taps, in Triton: one launch reads an activation once and writes all that a tap writes.

Imported only where it can run (`insitu.taps.fused`), since it imports Triton. Each program takes tiles of rows in turn
and keeps one sum; the last one to arrive adds those up in their order, then writes count, canary and stamp. So the
order of additions follows from the shape alone and no float is added atomically: the same tensor gives the same bits.
What tells the kernel where to write lies on the device: a captured graph that holds it writes where its replay is told
to. Two launches of one site must not run at once, on two streams: it has one place to arrive at.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Final

import triton
import triton.language as tl

MAX_PROGRAMS: Final = 512
"""Programs of a launch: about four for each multiprocessor of a large device; the last one reads a sum of each."""


def take(
    x,
    control,
    table,
    words,
    floats,
    partial,
    arrived,
    dest,
    kept,
    num_rows,
    width,
    stride_row,
    stride_col,
    site,
    IS_BOUNDARY: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    """Take x, [num_rows, width] by its strides, into the slab that the control block names.

    control: int64[8]. table: int64[num_sites, 8], a row of `insitu.taps.fused_layout.table_of` a site: 0 the place in
    `control` of its valid rows, 1 to 5 where stamp, count (int64s), canary, row sums and maxima (float32s) begin in a
    slab, 6 the int64s of a slab, 7 the most rows. Plain numbers below: each global that a kernel reads is looked up at
    each launch. words, floats: the memory of all slabs, as both. partial: float32[num_sites, MAX_PROGRAMS]; arrived:
    int32[num_sites], zero before and after. dest, kept: of `RowArea`, or None.
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    table += site * 8
    # No load waits for another before x is read: each wait is half a microsecond, most of what a small tensor takes.
    step, ring_place, valid_rows, valid_samples = (
        tl.load(control),
        tl.load(control + 1),
        tl.load(control + 2),
        tl.load(control + 3),
    )
    axis, at_stamp, at_count, at_canary = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
    at_sums, at_maxima, slab_words, max_rows = (
        tl.load(table + 4),
        tl.load(table + 5),
        tl.load(table + 6),
        tl.load(table + 7),
    )
    total = 0.0
    for first in range(program * BLOCK_ROWS, num_rows, num_programs * BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        said = tl.where(axis == 2, valid_rows, valid_samples)
        is_valid = (row < num_rows) & ((said < 0) | (row < said))
        is_kept = is_valid & (row < max_rows)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        if IS_BOUNDARY:
            bits = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.int32)
        if HAS_ROWS:
            place = tl.load(dest + row, mask=is_kept, other=max_rows)
        for start in range(0, width, BLOCK_COLS):
            column = start + tl.arange(0, BLOCK_COLS)
            is_there = (row < num_rows)[:, None] & (column < width)[None, :]
            value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_col, mask=is_there, other=0)
            number = tl.where(is_valid[:, None], value.to(tl.float32), 0.0)
            sums += number
            if IS_BOUNDARY:  # magnitudes are in order as integers, and NaN is the largest of them
                bits = tl.maximum(bits, number.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            if HAS_ROWS:
                to = kept + place[:, None] * width + column[None, :]
                tl.store(to, value, mask=is_there & (place < max_rows)[:, None])
        row_sum = tl.sum(sums, 1)
        if IS_BOUNDARY:
            absmax = tl.max(bits, 1).to(tl.float32, bitcast=True)
            begin = floats + ring_place * slab_words * 2
            tl.store(begin + at_sums + row, row_sum, mask=is_kept)
            tl.store(begin + at_maxima + row, absmax, mask=is_kept)
        total += tl.sum(row_sum, 0)
    is_last = num_programs == 1
    if num_programs > 1:
        tl.store(partial + site * MAX_PROGRAMS + program, total)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + site, 1, sem="acq_rel") == num_programs - 1
        if is_last:
            each = tl.arange(0, MAX_PROGRAMS)
            totals = tl.load(
                partial + site * MAX_PROGRAMS + each, mask=each < num_programs, other=0.0, cache_modifier=".cg"
            )
            tl.store(arrived + site, 0)
            total = tl.sum(totals, 0)
    if is_last:
        slab = ring_place * slab_words
        tl.store(floats + slab * 2 + at_canary, total)
        if IS_BOUNDARY or HAS_ROWS:
            said = tl.where(axis == 2, valid_rows, valid_samples)
            tl.store(words + slab + at_count, tl.where(said < 0, num_rows, tl.minimum(said, num_rows)))
        tl.store(words + slab + at_stamp, step)


_FIXED: Final = ("control", "table", "words", "floats", "partial", "arrived", "dest", "kept", "num_rows", "site")
"""Arguments of which a compiled kernel knows nothing: no value of theirs makes another one be compiled in a step."""
EVEN: Final = triton.jit(do_not_specialize=_FIXED)(take)
"""For rows whose address, width and distance are multiples of 16, side by side: they are read 16 bytes at a time."""
ODD: Final = triton.jit(do_not_specialize=(*_FIXED, "x", "width", "stride_row", "stride_col"))(take)
"""For any other."""
