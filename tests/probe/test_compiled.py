"""Compiled models: one graph without a break, a step outside of it, and what eager says of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compiled_kit import Stack, compiled_itself, counting, wrapped
from torch import nn

import insitu
from insitu.testing import Recording, expect
from insitu.vocabulary import IntervalClass

WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {"torch.compile": wrapped, "model.compile": compiled_itself}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ["attach first", "compile first"])
def test_every_site_fires_in_one_graph_whichever_came_first(insitu_records: Recording, way: str, order: str) -> None:
    model, backend, x = Stack().eval(), counting(), torch.randn(4, 8)
    with torch.inference_mode():
        expected = model(x)
        if order == "attach first":
            session = insitu.attach(model, to=insitu_records)
            compiled = WAYS[way](model, backend)
        else:
            compiled = WAYS[way](model, backend)
            compiled(x)  # a graph without taps, which must not run again
            session = insitu.attach(compiled, to=insitu_records)
            backend.frame_count = 0
        outputs = [compiled(x) for _ in range(4)]
        session.flush()
        coverage = session.coverage()
        session.close()
    assert all(torch.allclose(output, expected) for output in outputs)
    assert coverage.never_fired == [], "a tap is missing from the graph"
    assert coverage.steps == 4
    assert backend.frame_count == 1, "one graph, no break, no recompilation"
    assert [row["step_id"] for row in insitu_records.rows("steps")] == [0, 1, 2, 3]


def test_a_graph_says_what_eager_says(insitu_records: Recording) -> None:
    model, other = Stack().eval(), Recording()
    twin = copy.deepcopy(model)
    xs = [torch.randn(n, 8) for n in (3, 3, 5, 2, 7)]
    xs[3][1, 4] = math.nan
    with torch.inference_mode(), insitu.attach(model, to=insitu_records), insitu.attach(twin, to=other):
        compiled = wrapped(model)
        for x in xs:
            compiled(x)
            twin(x)
    for column in ("step_id", "site", "num_rows", "nonfinite_rows"):
        assert insitu_records.table("summaries")[column] == other.table("summaries")[column]
    for column in ("canary", "row_sum", "absmax"):
        found, expected = (np.array(r.table("summaries")[column].to_pylist(), float) for r in (insitu_records, other))
        assert np.allclose(found, expected, 1e-5, 1e-5, equal_nan=True), column
    computed = {row["step_id"] for row in insitu_records.rows("intervals", cls=IntervalClass.COMPUTE)}
    assert computed == {0, 1, 2, 3, 4}
    dtypes = [row["dtype"] for row in insitu_records.rows("sites")]
    assert dtypes == [row["dtype"] for row in other.rows("sites")]


def test_batch_sizes_and_variants_make_no_further_graph_after_warm_up(insitu_records: Recording) -> None:
    model, backend = Stack().eval(), counting()
    rules = [insitu.Rule(sites="L*.resid_post", requests="opt-in")]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules) as session:
        compiled = wrapped(model, backend)

        def step(num_rows: int, capture: bool, num_padded: int) -> None:
            rows = [insitu.Rows("a", start=0, count=num_rows, capture=capture)]
            with session.step(rows=rows, num_padded=num_padded):
                compiled(torch.randn(num_rows + num_padded, 8))

        for num_rows in (4, 6):
            for capture in (False, True):
                step(num_rows, capture, 0)
        warm = backend.frame_count
        random = np.random.default_rng(0)
        for _ in range(60):
            step(int(random.integers(2, 30)), bool(random.integers(2)), int(random.integers(3)))
        assert backend.frame_count == warm, "a graph was compiled while serving"
    assert warm <= 4, "two variants, each for one size and then for any"


def test_both_variants_are_compiled_while_the_model_warms_up(insitu_records: Recording) -> None:
    model, backend = Stack().eval(), counting()
    with (
        torch.inference_mode(),
        insitu.attach(
            model, to=insitu_records, rules=[insitu.Rule(sites="L1.resid_post", requests="opt-in")]
        ) as session,
    ):
        compiled = wrapped(model, backend)
        for _ in range(2):
            compiled(torch.ones(3, 8))
        warm = backend.frame_count
        with session.step(9, rows=[insitu.Rows("a", 0, 3, capture=True)]):
            compiled(torch.ones(3, 8))
    assert (warm, backend.frame_count) == (2, 2)
    assert len(insitu_records.rows("captures")) == 3
    assert {row["step_id"] for row in insitu_records.rows("captures")} == {9}


def test_a_graph_break_of_the_model_s_own_loses_no_site(insitu_records: Recording) -> None:
    class Broken(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            for layer in self.layers[1:]:
                x = layer(x)
            output: torch.Tensor = self.lm_head(x)
            return output

    model, x = Broken().eval(), torch.randn(3, 8)
    with torch.inference_mode():
        expected = model(x)
        with insitu.attach(model, to=insitu_records) as session:
            compiled = torch.compile(model, backend="eager")
            assert all(torch.allclose(compiled(x), expected) for _ in range(3))
            session.flush()
            assert (session.coverage().never_fired, session.coverage().steps) == ([], 3)


def test_a_module_that_runs_outside_of_the_graph_is_seen_there(insitu_records: Recording) -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    with torch.inference_mode(), insitu.attach(model, to=insitu_records) as session:
        model.lm_head.forward = torch.compiler.disable(model.lm_head.forward)  # type: ignore[method-assign, no-untyped-call]
        compiled = torch.compile(model, backend="eager")
        for _ in range(3):
            compiled(x)
        session.flush()
        assert session.coverage().never_fired == []


def test_an_exception_in_a_compiled_model_passes_through_and_the_next_step_is_observed(
    insitu_records: Recording,
) -> None:
    model = Stack().eval()
    with torch.inference_mode(), insitu.attach(model, to=insitu_records):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(Exception, match=r"shape|size|mat1"):
            compiled(torch.ones(2, 3))
        compiled(torch.ones(2, 8))
    assert [row["step_id"] for row in insitu_records.rows("summaries")][-1] == 1
    assert expect(insitu_records.rows("steps", step_id=1), variant=0)


def test_a_module_that_returns_no_tensor_is_not_said_never_to_fire(insitu_records: Recording) -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing, self.last = Nothing(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.last(self.nothing(x)["x"])
            return output

    model = Net().eval()
    with torch.inference_mode(), insitu.attach(model, to=insitu_records) as session:
        compiled = wrapped(model)
        for _ in range(15):
            compiled(torch.ones(2, 4))
        session.flush()
        assert session._observer is not None and session._observer.silent_sites(10) == []
