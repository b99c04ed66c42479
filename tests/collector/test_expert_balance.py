"""How evenly a router chooses is what its loads say, whatever steps and ranks they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu_collector.rows.selection import NothingFound
from insitu_collector.simulate import Scenario, simulate, write_store
from insitu_collector.store import open_store
from insitu_collector.values.expert_balance import expert_balance, gini

SITES = pa.Table.from_pylist(
    [
        {"epoch": epoch, "rank": epoch, "stage": stage, "row_seq": site, "site": site, "name": name}
        for epoch, stage, site, name in (
            (2, 1, 0, "L1.router_logits"),
            (1, 0, 4, "L0.router_logits"),
            (3, 1, 9, "L1.router_logits"),
        )
    ],
    schema=schema_of("sites"),
)


def loads(*rows: dict[str, Any]) -> pa.Table:
    full = [{"rank": row["epoch"], "stage": 0, "row_seq": at, **row} for at, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=schema_of("expert_loads"))


def test_steps_and_ranks_add_up_in_order_of_execution() -> None:
    rows = loads(
        {"epoch": 2, "step_id": 1, "site": 0, "num_rows": 4, "load": [8, 0, 0, 0]},
        {"epoch": 3, "step_id": 1, "site": 9, "num_rows": 4, "load": [0, 8, 0, 0]},
        {"epoch": 1, "step_id": 1, "site": 4, "num_rows": 2, "load": [1, 1, 1, 1]},
        {"epoch": 1, "step_id": 2, "site": 4, "num_rows": 2, "load": [1, 1, 1, 1]},
        {"epoch": 7, "step_id": 2, "site": 4, "num_rows": 2, "load": [9, 9]},
    )
    even, uneven = expert_balance(rows, SITES).to_pylist()
    assert even == {
        "site": "L0.router_logits",
        "num_parts": 2,
        "num_rows": 4,
        "num_experts": 4,
        "top_k": 2.0,
        "max_over_mean": 1.0,
        "cv": 0.0,
        "gini": 0.0,
        "hottest": 0,
        "num_dead": 0,
        "load": [2, 2, 2, 2],
    }
    assert (uneven["site"], uneven["load"], uneven["num_dead"]) == ("L1.router_logits", [8, 8, 0, 0], 2)
    assert (uneven["max_over_mean"], uneven["cv"], uneven["gini"]) == (2.0, 1.0, 0.5)


def test_a_router_that_chose_nothing_has_no_shape_and_another_number_of_experts_is_another_router() -> None:
    rows = loads(
        {"epoch": 1, "step_id": 1, "site": 4, "num_rows": 0, "load": [0, 0]},
        {"epoch": 1, "step_id": 1, "site": 4, "num_rows": 1, "load": [1, 0, 0]},
        {"epoch": 1, "step_id": 1, "site": 4, "num_rows": 1, "load": None},
    )
    none, some = expert_balance(rows, SITES).to_pylist()
    assert (none["gini"], none["hottest"], none["num_dead"], none["top_k"]) == (None, None, 2, None)
    assert some["gini"] == pytest.approx(1 - 1 / 3) and some["num_experts"] == 3
    assert expert_balance(loads(), SITES).num_rows == 0


@given(load=st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any))
def test_gini_is_half_the_mean_difference_over_the_mean(load: list[int]) -> None:
    values = np.array(load, np.float64)
    difference = np.abs(values[:, None] - values[None]).mean()
    assert gini(np.array([load]))[0] == pytest.approx(difference / (2 * values.mean()), abs=1e-12)


def test_a_store_tells_of_its_routers_or_that_there_are_none(tmp_path: Path) -> None:
    tables = simulate(Scenario(seed=1, seconds=2.0))
    write_store({**tables, "expert_loads": schema_of("expert_loads").empty_table()}, str(tmp_path / "none"))
    with pytest.raises(NothingFound, match="no loads of experts"):
        open_store(tmp_path / "none").experts()
    source = next(row for row in tables["sources"].to_pylist() if row["rank"] == 0)
    site = next(row for row in tables["sites"].to_pylist() if row["rank"] == 0)
    steps = tables["steps"].to_pylist()
    row = {"epoch": source["epoch"], "rank": 0, "site": site["site"], "num_rows": 2, "load": [3, 1]}
    told = loads(*({**row, "step_id": step} for step in sorted({each["step_id"] for each in steps})))
    write_store({**tables, "expert_loads": told}, str(tmp_path / "some"))
    (found,) = open_store(tmp_path / "some").experts().to_pylist()
    assert found["site"] == site["name"] and found["load"] == [3 * told.num_rows, told.num_rows]
    (early,) = open_store(tmp_path / "some").experts(t1=_middle(tables)).to_pylist()
    assert 0 < early["num_parts"] < told.num_rows, "a window holds the steps that began in it"


def _middle(tables: dict[str, pa.Table]) -> int:
    source = tables["sources"].to_pylist()[0]
    begun = np.sort(np.asarray(tables["steps"]["t0_ns"]))
    return int(begun[len(begun) // 2]) + int(source["unix_anchor_ns"] - source["mono_anchor_ns"])
