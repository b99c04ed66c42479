"""Many steps of many shapes, read back together: each says what it computed, and nothing of another."""

from __future__ import annotations

from collections import Counter
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


ASKED = [insitu.Rows("a", start=0, count=3, capture=True), insitu.Rows("b", start=3, count=2)]


@pytest.mark.parametrize("mode", [None, "eager"])
@pytest.mark.parametrize(
    ("rows", "due"),
    [
        (ASKED, {"0": 2, "1": 3}),  # the last of each; the rows of who asked by name
        (ASKED[1:], {"0": 1}),
        (None, {"0": 5}),  # whose they are nobody says, so nobody asked by name
    ],
    ids=["asked", "not asked", "no row map"],
)
def test_rows_due_in_the_first_step_are_counted_at_the_sites_of_their_rule(
    insitu_records: Recording, mode: str | None, rows: Sequence[insitu.Rows] | None, due: dict[str, int]
) -> None:
    net = nn.Sequential(nn.Identity(), nn.Identity(), nn.ReLU())
    rules = [insitu.Rule(sites="0", requests="all", rows="last"), insitu.Rule(sites="1")]
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=rules, max_rows=8) as session:
        called = net if mode is None else torch.compile(net, backend=mode, fullgraph=True)
        for step in range(3):
            with session.step(step, rows=rows):
                called(values(step, 5))
            session.flush()
    num_due = sum(due.values())
    stats, stored = session.stats(), insitu_records.rows("captures")
    assert (stats.dropped, stats.untaken) == ({}, num_due)
    assert stats.produced["captures"] == len(stored)
    (event,) = insitu_records.rows("events", kind="rows_untaken")
    assert event["text"].startswith(f"{num_due} rows were due in the model's first step")
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    told = Counter((row["step_id"], names[row["site"]]) for row in stored)
    assert told == {(step, site): num for step in (1, 2) for site, num in due.items()}


def test_of_the_first_step_only_what_fired_and_can_be_kept_is_counted(insitu_records: Recording) -> None:
    """Not what nobody asked for, what the recorder holds, or a module that was not called."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.held, self.idle, self.last = nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.last(self.held(self.used(x)))
            return output

    rules = [insitu.Rule(sites="used", requests="all"), insitu.Rule(sites="idle", requests="all")]
    net, flight = Idle(), insitu.Flight(rows="held")
    with torch.inference_mode():
        with insitu.attach(net, to=insitu_records, rules=rules, max_rows=8, flight=flight) as session:
            with session.step(rows=[]):
                pass  # no forward: nothing is known after it
            long = [insitu.Rows("long", start=0, count=6)]
            with session.step(rows=long):
                net(values(0, 6))
        assert session.stats().untaken == 6
        with insitu.attach(net, to=insitu_records, rules=rules[:1], max_rows=4) as session, session.step(rows=long):
            net(values(0, 6))
        untaken = 6 - 2  # those beyond max_rows had no place in any step
        assert (session.stats().dropped, session.stats().untaken) == ({"captures": {"slab_full": 2}}, untaken)
        opt_in = [insitu.Rule(sites="used")]
        with insitu.attach(net, to=insitu_records, rules=opt_in) as session, session.step(rows=ASKED[1:]):
            net(values(0, 5))
    assert session.stats().dropped == {}
