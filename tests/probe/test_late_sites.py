"""A site that fires first long after the first step is as good as any; one that gives nothing disturbs no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording

RULES = [insitu.Rule(sites="*", requests="all"), insitu.Rule(sites="*", take="summary", every=1)]
LATE = 5
"""The first step in which the late site fires."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Gives(nn.Module):
    """Returns what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        return x * 2 if self.output is None else self.output


class Branching(nn.Module):
    """Calls `rare` where it is told to, between two modules that it always calls."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.rare, self.last = nn.Identity(), Gives(), nn.Identity()
        self.is_rare = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.often(x)
        if self.is_rare:
            self.rare(x)
        output: torch.Tensor = self.last(x)
        return output


def serve(
    recording: Recording, model: Branching, num_steps: int = 12, mode: str | None = None, **options: Any
) -> insitu.Session:
    """Run steps of ones; `rare` is called in step LATE and after it. Return the closed session."""
    with torch.inference_mode(), insitu.attach(model, to=recording, max_rows=8, **options) as session:
        called: Any = model if mode is None else torch.compile(model, backend=mode, fullgraph=True)
        for step in range(num_steps):
            model.is_rare = step >= LATE
            with session.step(step):
                called(torch.full((2, 3), float(step)))
            session.flush()
        assert session.stats().probe_errors == 0
    return session


def steps_of(recording: Recording, table: str) -> dict[str, list[int]]:
    """Return by site the steps of which there are rows, in order."""
    names, found = {row["site"]: row["name"] for row in recording.rows("sites")}, dict[str, list[int]]()
    for row in recording.rows(table):
        steps = found.setdefault(names[row["site"]], [])
        if row["step_id"] not in steps:
            steps.append(row["step_id"])
    return found


@pytest.mark.parametrize("mode", [None, "eager"])
def test_rows_are_taken_of_a_site_that_fires_first_in_a_later_step(insitu_records: Recording, mode: str | None) -> None:
    session = serve(insitu_records, Branching(), rules=RULES, mode=mode)
    usual = list(range(1, 12))
    assert steps_of(insitu_records, "captures") == {
        "often": usual,
        "rare": list(range(LATE + 1, 12)),
        "last": usual,
        "output": usual,
    }
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    for row in insitu_records.rows("captures"):
        scale = 2.0 if names[row["site"]] == "rare" else 1.0
        assert np.frombuffer(row["data"], np.float32).tolist() == [scale * row["step_id"]] * 3
    statistics = steps_of(insitu_records, "statistics")
    assert statistics["rare"] == list(range(LATE, 12)), "a statistic needs no memory that a width decides"
    assert session.coverage().never_fired == []
    of_the_first, of_the_late = 3 * 2, 2
    assert session.stats().untaken == of_the_first
    assert session.stats().dropped["captures"] == {"slab_full": of_the_late}
    assert mode is not None or session.stats().dropped.keys() == {"captures"}


def test_rules_that_were_set_meanwhile_and_those_for_a_time_take_them_too(insitu_records: Recording) -> None:
    model = Branching()
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, max_rows=8) as session:
        for step in range(12):
            if step == 2:
                session.set_rules([insitu.Rule(sites="rare", requests="all")])
            if step == 4:
                session.set_rules([insitu.Rule(sites="*", requests="all")], for_s=3600.0)
            if step == 9:
                session.set_rules([insitu.Rule(sites="rare", requests="all", rows="last")])
            model.is_rare = step >= LATE
            with session.step(step, rows=[insitu.Rows("a", 0, 2)]):
                model(torch.full((2, 3), float(step)))
            session.flush()
    rare = next(row["site"] for row in insitu_records.rows("sites") if row["name"] == "rare")
    found = [(row["step_id"], row["row"]) for row in insitu_records.rows("captures", site=rare)]
    assert found == [(6, 0), (6, 1), (7, 0), (7, 1), (8, 0), (8, 1), (9, 1), (10, 1), (11, 1)]
    in_force = [row["step_id"] for row in insitu_records.rows("events", kind="rules_in_force")]
    assert in_force == [2, 4, 9], "to make room for more rows is no change of rules"


@pytest.mark.parametrize(
    "output",
    [
        torch.ones(2, 3, dtype=torch.float8_e5m2),
        torch.full((2, 3), 3, dtype=torch.uint16),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.tensor([1.0, 2.0]),
        torch.zeros(0, 3),
    ],
    ids=lambda x: f"{x.dtype} {list(x.shape)}",
)
def test_a_late_site_of_any_dtype_has_its_sums(insitu_records: Recording, output: torch.Tensor) -> None:
    model = Branching()
    model.rare.output = output
    with torch.inference_mode(), insitu.attach(model, to=insitu_records) as session:
        for step in range(9):
            model.is_rare = step >= LATE
            with session.step(step):
                model(torch.full((2, 3), float("inf") if step > LATE else 1.0))
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    told = [row["canary"] for row in insitu_records.rows("summaries") if names[row["site"]] == "rare"]
    parts = torch.view_as_real(output) if output.is_complex() else output.double()
    assert told == [float(parts.sum())] * 3
    assert session.stats().probe_errors == 0


@pytest.mark.parametrize("output", ["text", {"x": torch.ones(2)}, (), torch.eye(3).to_sparse()], ids=type)
def test_a_late_site_that_gives_no_tensor_disturbs_no_other(insitu_records: Recording, output: Any) -> None:
    model = Branching()
    model.rare.output = output
    session = serve(insitu_records, model, rules=RULES)
    usual = list(range(1, 12))
    assert steps_of(insitu_records, "captures") == {"often": usual, "last": usual, "output": usual}
    assert session.coverage().never_fired == ["rare"]
    assert [row["text"] for row in insitu_records.rows("events", kind="site_never_fired")] in ([], ["rare"])


@pytest.mark.parametrize(
    ("mode", "nothing"),
    [(None, None), (None, "text"), (None, {"x": torch.ones(2)}), (None, ()), ("eager", None)],
    ids=lambda each: type(each).__name__ if not isinstance(each, str) else each,
)
def test_a_site_that_gives_a_tensor_in_some_steps_only_fires_in_those(
    insitu_records: Recording, nothing: Any, mode: str | None
) -> None:
    class Sometimes(nn.Module):
        is_some = True

        def forward(self, x: torch.Tensor) -> Any:
            return x * 2 if self.is_some else nothing

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sometimes, self.always = Sometimes(), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.sometimes(x)
            output: torch.Tensor = self.always(x)
            return output

    model = Net().eval()
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=RULES, max_rows=8) as session:
        called: Any = model if mode is None else torch.compile(model, backend=mode, fullgraph=True)
        for step in range(12):
            model.sometimes.is_some = step % 2 == 0
            with session.step(step):
                called(torch.full((2, 3), float(step)))
            session.flush()
        assert session.stats().probe_errors == 0
    assert steps_of(insitu_records, "captures") == {
        "sometimes": list(range(2, 12, 2)),
        "always": list(range(1, 12)),
        "output": list(range(1, 12)),
    }


def test_a_step_number_that_comes_again_revives_nothing_of_the_step_that_had_it(insitu_records: Recording) -> None:
    model = Branching()
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, max_rows=8) as session:
        assert session._observer is not None
        num_slabs = session._observer.slabs.ring.size
        for at in range(2 * num_slabs):
            model.is_rare = at < num_slabs
            with session.step(at % num_slabs - 1):  # the first is -1, which no step should be
                model(torch.full((2, 3), 1.0 if at < num_slabs else float("inf")))  # told of each site that fired
            if at % 50 == 49:
                session.flush()
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    told = Counter(names[row["site"]] for row in insitu_records.rows("summaries"))
    assert told == {"often": num_slabs, "last": num_slabs, "output": 2 * num_slabs}
