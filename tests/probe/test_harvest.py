"""Many steps of many shapes, read back together: each says what it computed, and nothing of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording

WIDTH = 4
NUM_STEPS = 600
"""More than there are slabs, so that each is used more than once."""


def values(step: int, num_rows: int) -> torch.Tensor:
    """Return rows that say of themselves which they are; powers of two and small sums, exact in float32."""
    rows = torch.arange(num_rows)[:, None] + torch.arange(WIDTH) / WIDTH
    return (step * 16 + rows).float()


def row_map(step: int) -> Sequence[insitu.Rows] | None:
    """Return a map of one to three requests, none in every third step."""
    if step % 3 == 0:
        return None
    counts = [1 + (step + i) % 3 for i in range(1 + step % 3)]
    starts = np.cumsum([0, *counts]).tolist()
    return [
        insitu.Rows(f"r{step}.{i}", start, count, position=10 * step, capture=(step + i) % 2 == 0)
        for i, (start, count) in enumerate(zip(starts, counts, strict=False))
    ]


def num_rows(step: int) -> int:
    rows = row_map(step)
    return 1 + step % 5 if rows is None else sum(entry.count for entry in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("requests", ["opt-in", "all"])
def test_every_step_reads_back_as_itself(insitu_records: Recording, dtype: torch.dtype, requests: str) -> None:
    net = nn.Sequential(nn.Identity())
    rules = [insitu.Rule(sites="output", requests=requests)]
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=rules, max_rows=16) as session:
        net(values(0, 1).to(dtype))  # widths are learned: no rows of this one
        for step in range(1, NUM_STEPS):
            with session.step(step, rows=row_map(step)):
                net(values(step, num_rows(step)).to(dtype))
            if step % 50 == 0:
                session.flush()
    assert session.stats().dropped == {}

    summaries = {row["step_id"]: row for row in insitu_records.rows("summaries")}
    assert sorted(summaries) == list(range(NUM_STEPS))
    for step, row in summaries.items():
        x = values(step, 1 if step == 0 else num_rows(step)).double()
        assert (row["num_rows"], row["absmax"], row["row_sum"]) == (len(x), x.max(), x.sum())
        assert row["canary"] == pytest.approx(float(x.sum()))
        assert row["nonfinite_rows"] == []

    found = {(row["step_id"], row["row"]): row for row in insitu_records.rows("captures")}
    wanted: dict[tuple[int, int], tuple[str | None, int]] = {}
    for step in range(1, NUM_STEPS):
        rows = row_map(step)
        if rows is None:
            if requests == "all":
                wanted |= {(step, row): (None, -1) for row in range(num_rows(step))}
            continue
        for entry in rows:
            if requests == "all" or entry.capture:
                wanted |= {(step, entry.start + i): (entry.request, entry.position + i) for i in range(entry.count)}
    assert {key: (row["request"], row["position"]) for key, row in found.items()} == wanted
    kind = np.float32 if dtype is torch.float32 else np.float64
    for (step, at), row in found.items():
        assert (row["dtype"], row["shape"]) == (str(dtype).removeprefix("torch."), [WIDTH])
        assert np.frombuffer(row["data"], kind).tolist() == values(step, at + 1)[at].tolist()


def test_only_the_bad_steps_of_a_collection_tell_all_their_sites(insitu_records: Recording) -> None:
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, max_rows=8) as session:
        for step in range(40):
            x = values(step, 3)
            if step % 10 == 7:
                x[1, 2] = float("nan")
            with session.step(step):
                net(x)
    told = [(row["step_id"], row["nonfinite_rows"]) for row in insitu_records.rows("summaries")]
    bad = [row for row in told if row[0] % 10 == 7]
    assert bad == [(step, rows) for step in (7, 17, 27, 37) for rows in (None, None, [1])]
    assert [row for row in told if row not in bad] == [(step, []) for step in range(40) if step % 10 != 7]
