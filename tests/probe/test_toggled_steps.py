"""A long run in which everything is switched: rules, statistics, rows, eager and compiled. Not one value out of place.

Each value says of which step, site, row and column it is, as far as its dtype can: float32 and int64 say all of it.
What was shipped is looked at and forgotten every few steps, so that a long run takes no memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.rules.sampling import is_sampled
from insitu.testing import Recording
from insitu.vocabulary import Variant

RUN: Final = "0123456789abcdef"
SITES: Final[dict[str, tuple[torch.dtype, int]]] = {
    "whole": (torch.float32, 4),
    "ids": (torch.int64, 3),
    "narrow": (torch.bfloat16, 5),
    "bits": (torch.bool, 3),
    "bytes": (torch.uint8, 7),
    "output": (torch.float32, 2),
}
"""Name -> dtype and width; the rows of most are no multiple of anything."""
TELLS: Final = {torch.float32: 1 << 24, torch.int64: 1 << 40, torch.bfloat16: 251, torch.bool: 2, torch.uint8: 251}
"""So many numbers a dtype tells apart."""
EVERY: Final = 4
FLUSH_EVERY: Final = 24
"""Of so many steps no statistics find the 16 places taken: about 6 are sampled."""


def values(site: int, step: Any, row: Any, column: Any, dtype: torch.dtype) -> Any:
    """Return what a place holds, of tensors or arrays: below 2^24 for 100,000 steps, 6 sites, 8 rows."""
    return ((step * 6 + site) * 8 + row + (column << 24 if dtype is torch.int64 else column * 0)) % TELLS[dtype]


class Tells(nn.Module):
    """Returns [rows, width] of its site's dtype that say where they are from; given the step of each row, [rows, 1]."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.column: torch.Tensor
        self._site, (self._dtype, width) = list(SITES).index(name), SITES[name]
        self.register_buffer("column", torch.arange(width))

    def tell(self, step: torch.Tensor) -> torch.Tensor:
        row = torch.arange(step.shape[0])[:, None]
        found: torch.Tensor = values(self._site, step, row, self.column, self._dtype)
        return found.to(self._dtype)

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        return self.tell(step)


class Teller(Tells):
    """Its modules are the sites, and what it returns itself."""

    def __init__(self) -> None:
        super().__init__("output")
        for name in list(SITES)[:-1]:
            self.add_module(name, Tells(name))

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            module(step)
        return self.tell(step)


@dataclass(frozen=True)
class Choice:
    """Rules, and what they take: of each request its last row, or all rows of who opts in."""

    rules: Sequence[insitu.Rule]
    last: frozenset[str] = frozenset()
    opted: frozenset[str] = frozenset()
    measured: frozenset[str] = frozenset()


MEASURED: Final = insitu.Rule(sites="*", take="summary", every=EVERY)
NAMES: Final = frozenset(SITES)
CHOICES: Final = (
    Choice([]),
    Choice([insitu.Rule(sites="*")], opted=NAMES),
    Choice([MEASURED], measured=NAMES),
    Choice(
        [insitu.Rule(sites="ids", requests="all", rows="last"), insitu.Rule(sites="[bw]*"), MEASURED],
        frozenset({"ids"}),
        frozenset({"bits", "bytes", "whole"}),
        NAMES,
    ),
)
Key = tuple[int, str, str, int]
"""Step, site, request, row."""


@dataclass
class Expected:
    """What the steps since the last look are to have left."""

    steps: dict[int, int] = field(default_factory=dict)
    """Step -> valid rows."""
    captures: set[Key] = field(default_factory=set)
    measured: set[tuple[int, str]] = field(default_factory=set)
    full: set[int] = field(default_factory=set)

    def add(self, step: int, choice: Choice, first: int, second: int, is_wanted: bool) -> None:
        """A step of `first` rows of request a, which may opt in, and `second` of request b."""
        self.steps[step] = first + second
        keys = {(step, site, "a", row) for site in choice.opted if is_wanted for row in range(first)}
        ends = [("a", first - 1)] * (first > 0) + [("b", first + second - 1)] * (second > 0)
        keys |= {(step, site, request, row) for site in choice.last for request, row in ends}
        if choice.measured and is_sampled(RUN, step, EVERY):
            self.measured |= {(step, site) for site in choice.measured}
        if keys or (choice.measured and is_sampled(RUN, step, EVERY)):
            self.full.add(step)
        self.captures |= keys


def look(recording: Recording, names: dict[int, str], expected: Expected) -> None:
    """Compare what was shipped since the last look with what is expected, and forget both."""
    names.update({row["site"]: row["name"] for row in recording.rows("sites")})
    assert [row["step_id"] for row in recording.rows("steps")] == list(expected.steps)
    full = {row["step_id"] for row in recording.rows("steps", variant=int(Variant.FULL))}
    assert full == expected.full
    summaries = recording.rows("summaries")
    assert [row["step_id"] for row in summaries] == list(expected.steps), "a step left no stamp, or more than one"
    for row in summaries:
        step, n = row["step_id"], expected.steps[row["step_id"]]
        assert (names[row["site"]], row["num_rows"], row["nonfinite_rows"]) == ("output", n, [])
        assert row["absmax"] == (values(5, step, n - 1, 0, torch.float32) if n else 0.0), f"stamp of step {step}"
    found = [capture_of(row, names) for row in recording.rows("captures")]
    assert len(found) == len(set(found)) and set(found) == expected.captures
    measured = []
    for row in recording.rows("statistics"):
        step, site = row["step_id"], names[row["site"]]
        dtype, width = SITES[site]
        n = expected.steps[step]
        told = [values(list(SITES).index(site), step, r, c, dtype) for r in range(n) for c in range(width)]
        largest = pytest.approx(max(told), rel=1e-6) if told else None
        assert (row["num_values"], row["absmax"]) == (n * width, largest), f"{site} of step {step}"
        measured.append((step, site))
    assert len(measured) == len(set(measured)) and set(measured) == expected.measured
    recording.batches.clear()


def capture_of(row: dict[str, Any], names: dict[int, str]) -> Key:
    """Return which row it is, after a look at what it holds."""
    step, site = row["step_id"], names[row["site"]]
    dtype, width = SITES[site]
    told = torch.frombuffer(bytearray(row["data"]), dtype=dtype).to(torch.int64).numpy()
    number = list(SITES).index(site)
    assert told.tolist() == values(number, step, row["row"], np.arange(width), dtype).tolist(), f"{site} of step {step}"
    return step, site, row["request"], row["row"]


def run(num_steps: int, backend: str, change_every: int) -> insitu.Session:
    """Run steps drawn from a seed, and look at each; return the closed session."""
    draw, recording, names, expected = random.Random(17), Recording(), dict[int, str](), Expected()
    model, choice = Teller().eval(), CHOICES[0]
    with (
        torch.inference_mode(),
        insitu.attach(model, to=recording, max_rows=8, overhead_budget=1.0) as session,
    ):
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        for step in range(num_steps):
            if step % change_every == change_every - 1:
                choice = CHOICES[(CHOICES.index(choice) + draw.randint(1, 3)) % len(CHOICES)]
                session.set_rules(choice.rules)
            first, second, num_padded = draw.randint(0, 4), draw.randint(0, 4), draw.randint(2, 4)
            is_wanted = draw.random() < 0.5
            rows = [insitu.Rows("a", 0, first, capture=is_wanted), insitu.Rows("b", first, second)]
            x = torch.full((first + second + num_padded, 1), step)
            x[first + second :] = 1 << 22
            with session.step(step, rows=rows, num_padded=num_padded):
                (model if draw.random() < 0.5 else compiled)(x)
            expected.add(step, choice, first, second, is_wanted)
            if step % FLUSH_EVERY == FLUSH_EVERY - 1:
                assert session.flush().dropped == 0
                look(recording, names, expected)
                expected = Expected()
        session.flush()
        look(recording, names, expected)
        assert session.has_room and session._observer is not None and session._observer.is_read, (
            "a place is still taken"
        )
        assert session.coverage().never_fired == []
    return session


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("INSITU_RUN", RUN)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(300)  # two cores that much else runs on
def test_not_one_stamp_row_or_statistic_is_out_of_place_while_all_is_switched() -> None:
    session = run(1500, "eager", change_every=350)
    assert (session.stats().num_steps, session.stats().dropped) == (1500, {})


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_not_one_in_a_hundred_thousand_steps_while_all_is_switched(backend: str) -> None:
    began, num_steps = time.monotonic(), 100_000
    session = run(num_steps, backend, change_every=num_steps // (80 if backend == "eager" else 16))
    print(f"{num_steps} steps, compiled by {backend}: {time.monotonic() - began:.0f} s")
    assert (session.stats().num_steps, session.stats().dropped) == (num_steps, {})
