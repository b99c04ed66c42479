"""A site that does not fire is said after ten steps, taken back when it fires, and never said of what fires rarely."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.session.row_map import Rows
from insitu.sites.never_fired import ENOUGH_STEPS, FIRED, NEVER_FIRED, SEPARATOR, NeverFired
from insitu.testing import Recording

NAMES = st.lists(st.sets(st.sampled_from("abcdef")), max_size=8)


class Branching(nn.Module):
    """Calls `rare` when it is told to; holds modules that nobody calls, in a list, and one that returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.often = nn.Linear(4, 4)
        self.rare = nn.Linear(4, 4)
        self.unused = nn.ModuleList([nn.Linear(4, 4)])
        self.wordy = Wordy()
        self.is_rare = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.wordy(x)
        out: torch.Tensor = self.rare(self.often(x)) if self.is_rare else self.often(x)
        return out


class Wordy(nn.Module):
    def forward(self, x: torch.Tensor) -> str:
        return f"{x.shape[0]} rows"


def told(records: Recording) -> list[tuple[str, str]]:
    rows: list[dict[str, Any]] = records.rows("events")
    return [(row["kind"], row["text"]) for row in rows if row["kind"] in (NEVER_FIRED, FIRED)]


def run(session: insitu.Session, model: nn.Module, steps: int) -> None:
    with torch.no_grad():
        for _ in range(steps):
            with session.step():
                model(torch.ones(2, 4))
    session.flush()


def test_it_is_said_once_after_enough_steps_and_taken_back(insitu_records: Recording) -> None:
    model = Branching()
    with insitu.attach(model, to=insitu_records) as session:
        run(session, model, ENOUGH_STEPS - 1)
        assert told(insitu_records) == []
        run(session, model, 1)
        assert told(insitu_records) == [(NEVER_FIRED, "rare, unused.0")]
        run(session, model, 5)
        assert len(told(insitu_records)) == 1
        model.is_rare = True
        run(session, model, 1)
        assert told(insitu_records)[1:] == [(FIRED, "rare")]
        model.is_rare = False
        run(session, model, ENOUGH_STEPS)
    assert len(told(insitu_records)) == 2
    assert session.coverage().never_fired == ["unused.0", "wordy"]


def test_a_run_that_ends_at_once_says_it_at_its_end(insitu_records: Recording) -> None:
    model = Branching()
    with insitu.attach(model, to=insitu_records), torch.no_grad():
        for _ in range(ENOUGH_STEPS):
            model(torch.ones(2, 4))
    assert told(insitu_records) == [(NEVER_FIRED, "rare, unused.0")]


def test_logits_are_waited_for_in_steps_that_sample(insitu_records: Recording) -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
            self.samples = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.body(x)
            return self.head(out) if self.samples else out

    model = Headed()
    with insitu.attach(model, to=insitu_records, axes={"head": "samples"}) as session, torch.no_grad():
        for sample_row in [-1] * (3 * ENOUGH_STEPS) + [0] * (ENOUGH_STEPS - 1):
            with session.step(rows=[Rows("a", 0, 2, 0, sample_row=sample_row)]):
                model(torch.ones(2, 4))
        session.flush()
        assert told(insitu_records) == []
        with session.step(rows=[Rows("a", 0, 2, 0, sample_row=0)]):
            model(torch.ones(2, 4))
        session.flush()
        assert told(insitu_records) == [(NEVER_FIRED, "head")]


@given(NAMES)
def test_rows_add_up_to_what_is_silent(looks: list[set[str]]) -> None:
    watch, standing = NeverFired(), set[str]()
    for silent in looks:
        rows = watch.look(sorted(silent))
        for kind, text in rows:
            names = set(text.split(SEPARATOR))
            assert names.isdisjoint(standing) if kind == NEVER_FIRED else names <= standing
            standing = standing | names if kind == NEVER_FIRED else standing - names
        assert standing == silent
        assert watch.look(sorted(silent)) == []
