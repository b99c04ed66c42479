"""Offline, a step waits for room: nothing is dropped, and what the rules took comes back as tables."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from exporter_kit import Hanging
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.exporters.base import Ack, Batch, Level, Retry
from insitu.records import schema_of
from insitu.session.collected_rows import side_by_side
from insitu.testing import Recording

RULES = [insitu.Rule(sites="?*", take="rows", requests="all")]


class Slow(Recording):
    """Takes one batch at a time, and has it on its disk a moment later."""

    def __init__(self) -> None:
        super().__init__()
        self.num_refused = 0

    def export(self, batch: Batch) -> Ack:
        if any(self._durable.get(done.stream, -1) < done.seq for done in self.batches):
            self.num_refused += 1
            raise Retry(0.0)
        self.batches.append(batch)
        return Ack(batch.stream, batch.seq, Level.PENDING)

    def flush(self, timeout_s: float) -> bool:
        threading.Event().wait(0.001)
        self._durable |= {batch.stream: batch.seq for batch in self.batches}
        return True


def two_layers(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def test_rows_of_many_inputs_come_back_joined_as_the_model_computed_them() -> None:
    net, recording = two_layers(), Recording()
    inputs = [torch.randn(number % 4 + 1, 8) for number in range(50)]
    with insitu.attach(net, to=recording, rules=RULES, max_rows=8) as session:
        collected = session.collect(inputs)
    rows = collected.rows()
    assert rows.column_names == ["input", "step_id", "request", "row", "position", "0", "1", "output"]
    assert len(rows) == sum(map(len, inputs))
    with torch.no_grad():
        hidden = [net[0](x) for x in inputs]  # type: ignore[index]
    for row in rows.to_pylist():
        assert np.array_equal(np.float32(row["0"]), hidden[row["input"]][row["row"]].numpy())
        assert np.array_equal(np.float32(row["1"]), hidden[row["input"]].tanh()[row["row"]].numpy())
    assert collected.inputs.to_pydict() == {
        "input": list(range(50)),
        "first_step": list(range(1, 51)),
        "num_steps": [1] * 50,
    }
    assert collected.dropped == {}
    assert collected.table("steps")["input"].to_pylist() == list(range(50))
    assert len(collected.table("captures")) == 3 * len(rows)
    assert collected.table("expert_loads").num_rows == 0


def test_a_slow_destination_and_small_memory_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_MAX_QUEUE_BYTES", "1MiB")
    slow = Slow()
    net = two_layers(256)
    with insitu.attach(net, to=slow, rules=RULES, max_rows=32) as session:
        collected = session.collect(torch.randn(32, 256) for _ in range(100))
    assert slow.num_refused > 0
    assert collected.dropped == {}
    assert len(collected.rows()) == 100 * 32
    assert session.stats().dropped == {}


def test_a_destination_that_takes_nothing_is_an_error_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("insitu.drain.thread.GRACE_S", 0.2)
    hanging = Hanging()
    net = two_layers()
    session = insitu.attach(net, to=hanging, rules=RULES, max_rows=8)
    try:
        with pytest.raises(TimeoutError, match=r"has taken nothing for 0\.1 s"):
            session.collect((torch.randn(8, 8) for _ in range(1000)), timeout_s=0.1)
    finally:
        hanging.let_go.set()
        session.close()
    net(torch.randn(1, 8))  # a step by itself waits for nobody


def test_a_call_that_takes_many_steps_and_inputs_by_name(tmp_path: Path) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x + y)
            return result

    net = Adds()
    one = torch.ones(1, 2)
    with insitu.attach(net, to=f"file://{tmp_path}", rules=RULES, max_rows=4) as session:
        pairs = session.collect([(one, one), {"x": one, "y": one}])
        assert pairs.inputs["num_steps"].to_pylist() == [1, 1]

        def twice_or_thrice(number: int) -> None:
            for _ in range(number):
                with session.step(rows=[insitu.Rows(f"r{number}", 0, 1, position=5)]):
                    net(one, one)

        many = session.collect([2, 3], twice_or_thrice)
    assert many.inputs["num_steps"].to_pylist() == [2, 3]
    assert many.rows()["request"].to_pylist() == ["r2"] * 2 + ["r3"] * 3
    assert many.rows()["input"].to_pylist() == [0] * 2 + [1] * 3


def test_no_input_no_rule_and_no_model() -> None:
    with insitu.attach(two_layers(), to=Recording()) as session:
        nothing = session.collect([])
        assert (len(nothing.rows()), len(nothing.inputs), nothing.table("steps").num_rows) == (0, 0, 0)
        unruled = session.collect([torch.ones(1, 8)])
        assert (len(unruled.rows()), len(unruled.table("summaries"))) == (0, 1)
    with insitu.start(to=Recording()) as driver, pytest.raises(ValueError, match="observes no model"):
        driver.collect([1])


def test_switched_off_the_call_runs_and_nothing_is_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_DISABLED", "1")
    session = insitu.attach(two_layers())
    seen: list[int] = []
    assert len(session.collect([1, 2], seen.append).rows()) == 0
    assert seen == [1, 2]


captures = st.dictionaries(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from(["a", "b", None]), st.integers(0, 3)),
    st.lists(st.integers(-5, 5), min_size=2, max_size=2),
    max_size=30,
)


@given(captures)
def test_each_captured_value_stands_in_the_row_and_column_it_belongs_to(
    found: dict[tuple[int, int, str | None, int], list[int]],
) -> None:
    rows = [
        {
            "epoch": 7,
            "rank": 0,
            "stage": 0,
            "row_seq": number,
            "step_id": step,
            "site": site,
            "request": request,
            "row": at,
            "position": -1 if request is None else at,
            "dtype": "float32",
            "shape": [2],
            "data": np.array(values, np.float32).tobytes(),
        }
        for number, ((step, site, request, at), values) in enumerate(found.items())
    ]
    table = pa.Table.from_pylist(rows, schema=schema_of("captures"))
    joined = side_by_side(table, {0: "x", 1: "y", 2: "z"})
    back = {
        (row["step_id"], "xyz".index(name), row["request"], row["row"]): row[name]
        for row in joined.to_pylist()
        for name in set(row) & set("xyz")
        if row[name] is not None
    }
    assert back == found
    assert len(joined) == len({(step, request, at) for step, _, request, at in found})
