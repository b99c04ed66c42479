"""A module that runs several times in a step: its last call is kept, and how often it fired is said once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.sites.repeated import REPEATED, Repeated
from insitu.testing import Recording


class Looped(nn.Module):
    """Runs one block over and over."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.block, self.times = nn.Identity(), nn.Linear(3, 3), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = self.block(x)
        return x


def told(recording: Recording) -> list[str]:
    return [row["text"] for row in recording.rows("events", kind=REPEATED)]


def run(recording: Recording, model: Looped, mode: str | None) -> tuple[insitu.Session, list[float]]:
    """Run four steps; return the closed session and the sum of what each returned."""
    sums = []
    rules = [insitu.Rule(sites="block", requests="all")]
    with torch.inference_mode(), insitu.attach(model, to=recording, rules=rules) as session:
        called: Any = model if mode is None else torch.compile(model, backend=mode, fullgraph=True)
        for step in range(4):
            sums.append(float(called(torch.full((2, 3), float(step))).sum()))
            session.flush()
    return session, sums


@pytest.mark.parametrize("mode", [None, "eager"])
def test_the_last_call_is_kept_and_how_often_it_fired_is_said_once(insitu_records: Recording, mode: str | None) -> None:
    torch.manual_seed(0)
    session, sums = run(insitu_records, Looped(3), mode)
    assert session.coverage().fires == {"block": 3}
    assert told(insitu_records) == ["fires = k > 1 in the first step, and the last call is kept: block x3"]
    kept = dict.fromkeys(range(4), 0.0)
    for row in insitu_records.rows("captures"):
        kept[row["step_id"]] += float(np.frombuffer(row["data"], np.float32).sum())
    assert list(kept.values())[1:] == pytest.approx(sums[1:], abs=1e-5), "the first step takes no rows"


@pytest.mark.parametrize("mode", [None, "eager"])
def test_nothing_is_said_of_modules_that_run_once(insitu_records: Recording, mode: str | None) -> None:
    session, _ = run(insitu_records, Looped(1), mode)
    assert session.coverage().fires == {}
    assert told(insitu_records) == []


def test_a_step_of_two_forwards_fires_twice(insitu_records: Recording) -> None:
    model = Looped(1)
    with torch.inference_mode(), insitu.attach(model, to=insitu_records) as session:
        for _ in range(3):
            with session.step():
                model(torch.ones(2, 3))
                model(torch.ones(2, 3))
        fires = session.coverage().fires
    assert set(fires.values()) == {2}
    assert {"first", "block", "output"} <= set(fires)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(2, 9)), max_size=6))
def test_no_site_is_told_of_twice(looks: list[dict[str, int]]) -> None:
    repeated = Repeated()
    texts = " ".join(text for look in looks if (text := repeated.look(look)) is not None)
    for name in "abc":
        assert texts.count(f"{name} x") == any(name in look for look in looks)
