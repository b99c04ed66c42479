"""The test kit: nothing is imported until a test uses it, and its sentences fail when they are not so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
import insitu.testing
from insitu.guard import Guard
from insitu.testing import FakeClock, Origin, Recording, expect, oracle_model, oracle_values, origin_of
from insitu.testing.oracle import MAX_LAYERS, MAX_ROWS, MAX_STEPS, SITES

HEAVY = ("torch", "pyarrow", "grpc", "numpy", "transformers", "insitu.exporters", "insitu.records", "insitu.config")


def test_it_costs_no_pytest_anything(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n\ndef test_nothing(request):\n    assert 'insitu.testing' in sys.modules\n"
        f"    print('loaded', *(set({HEAVY!r}) & set(sys.modules)), '.')\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "insitu.testing",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "loaded ." in ran.stdout


def test_every_name_is_there() -> None:
    assert all(getattr(insitu.testing, name) for name in insitu.testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        insitu.testing.nonsense  # noqa: B018


@given(
    site=st.sampled_from(SITES),
    layer=st.integers(0, MAX_LAYERS - 1),
    step=st.integers(0, MAX_STEPS - 1),
    num_rows=st.integers(1, MAX_ROWS),
)
def test_each_number_of_the_oracle_says_where_it_is_from(site: str, layer: int, step: int, num_rows: int) -> None:
    values = oracle_values(site, layer, step, num_rows, 2)
    assert values.dtype is torch.float32
    for row, (first, second) in enumerate(values.tolist()):
        assert first == second
        assert origin_of(first) == Origin(site, layer, step, row)


@pytest.mark.parametrize("value", [0.0, 0.5, -64.0, 2.0**24 + 64, float("nan"), float("inf")])
def test_a_number_of_nobody_is_refused(value: float) -> None:
    with pytest.raises((ValueError, OverflowError)):
        origin_of(value)


@pytest.mark.parametrize("beyond", [{"layer": MAX_LAYERS}, {"step": MAX_STEPS}, {"num_rows": MAX_ROWS + 1}])
def test_what_it_cannot_tell_apart_it_refuses(beyond: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="apart, no more"):
        oracle_values("mlp_out", **{"layer": 0, "step": 0, "num_rows": 1, "width": 1, **beyond})


def recorded(records: Recording, steps: tuple[int, ...] = (0, 1, 2)) -> insitu.Session:
    """Return a closed session that saw an oracle in these steps."""
    model = oracle_model(num_layers=2)
    rules = [insitu.Rule(sites="L*", requests="all")]
    with insitu.attach(model, to=records, rules=rules) as session, torch.inference_mode():
        for step in steps:
            model.say_next(step)
            with session.step(step):
                model(torch.zeros(1, 5, 4))
    return session


def test_what_is_so_is_said_in_one_breath(insitu_records: Recording) -> None:
    session = recorded(insitu_records)
    expect(insitu_records).steps(3).every_row_once().account_of(session.stats()).no_row(
        "events", kind="rows_absent"
    ).the_oracle_is_right()
    values = expect(insitu_records).captured("L1.mlp_out", step_id=2)
    assert np.array_equal(values, oracle_values("mlp_out", 1, 2, 5, 4).numpy())
    assert expect(insitu_records).row("sites", name="L0.attn_out")["fqn"] == "model.layers.0.self_attn"


def changed(records: Recording, table: str, **columns: Any) -> Recording:
    """Return a recording whose first row of a table has other columns."""
    import pyarrow as pa

    from insitu.exporters import Batch

    found, is_done = Recording(), False
    for batch in records.batches:
        data = batch.data
        if batch.table == table and not is_done:
            rows = data.to_pylist()
            rows[0] |= columns
            data, is_done = pa.RecordBatch.from_pylist(rows, schema=data.schema), True
        found.export(Batch(batch.epoch, batch.seq, data, batch.table))
    return found


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        (lambda r, s: expect(r).steps(2), "expected 2 steps, found"),
        (lambda r, s: expect(changed(r, "steps", step_id=1)).steps(3), "expected 3 steps"),
        (lambda r, s: expect(changed(r, "steps", row_seq=7)).every_row_once(), "each row of steps once"),
        (lambda r, s: expect(r).row("steps"), "expected one row with {}, found 3"),
        (lambda r, s: expect(r).no_row("steps", step_id=1), "expected no row of steps"),
        (lambda r, s: expect(r).captured("L1.mlp_out", step_id=9), "expected rows of L1.mlp_out"),
        (lambda r, s: expect(changed(r, "captures", row=4)).the_oracle_is_right(), "expected a row of Origin"),
        (lambda r, s: expect(changed(r, "captures", step_id=2)).the_oracle_is_right(), "expected a row of Origin"),
        (lambda r, s: expect(Recording()).the_oracle_is_right(), "found none"),
        (lambda r, s: expect(Recording()).account_of(s.stats()), "made, 0 kept"),
        (lambda r, s: expect([{"a": 1}], a=2), "expected one row with {'a': 2}, found 0"),
    ],
)
def test_what_is_not_so_fails(sentence: Any, message: str, insitu_records: Recording) -> None:
    session = recorded(insitu_records)
    with pytest.raises(AssertionError, match=message):
        sentence(insitu_records, session)


def test_a_row_of_another_layer_is_found(insitu_records: Recording) -> None:
    recorded(insitu_records)
    sites = {row["name"]: row["site"] for row in insitu_records.rows("sites")}
    wrong = changed(insitu_records, "captures", site=sites["L1.resid_post"])
    with pytest.raises(AssertionError, match="expected a row of Origin"):
        expect(wrong).the_oracle_is_right()


def test_the_oracle_counts_its_forwards_and_lets_nan_through(insitu_oracle: Any) -> None:
    x = torch.zeros(2, 4)
    assert [origin_of(float(insitu_oracle(x)[1, 0])) for _ in range(2)] == [
        Origin("resid_post", 2, step, 1) for step in (0, 1)
    ]
    assert insitu_oracle.step == 1
    x[1] = torch.nan
    assert insitu_oracle(x).isnan().tolist() == [[False] * 4, [True] * 4]
    with pytest.raises(ValueError, match="rows of 4 values, not of 5"):
        insitu_oracle(torch.zeros(1, 5))


def test_a_clock_goes_on_when_it_is_told_to(insitu_clock: FakeClock) -> None:
    assert (insitu_clock(), insitu_clock.ns()) == (100.0, 100_000_000_000)
    insitu_clock.advance(0.25)
    assert (insitu_clock(), insitu_clock.ns()) == (100.25, 100_250_000_000)
    with pytest.raises(ValueError, match="does not go back by 1 s"):
        insitu_clock.advance(-1)


def test_errors_are_raised_again_unless_a_test_asks(request: pytest.FixtureRequest) -> None:
    guard, error = Guard("part"), OSError("x")
    with pytest.raises(OSError, match="x"):
        guard.contain(error)
    request.getfixturevalue("insitu_contains")
    guard.contain(error)
    assert guard.num_errors == 2


@pytest.mark.usefixtures("insitu_contains")
def test_a_failing_tap_is_contained_where_a_test_asks(
    insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    with insitu.attach(model, to=insitu_records) as session, torch.inference_mode():
        model(torch.ones(1, 2))
        assert session._observer is not None
        monkeypatch.setattr(session._observer.taps, "_take_boundary", None)
        assert model(torch.ones(1, 2)).shape == (1, 2)
