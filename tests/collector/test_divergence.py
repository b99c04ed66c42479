"""Ranks that hold a site whole and do not hold the same bits are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from insitu.records import schema_of
from insitu_collector.rows.selection import NothingFound
from insitu_collector.simulate import Scenario, simulate, write_store
from insitu_collector.store import open_store
from insitu_collector.values.divergence import divergence

SITES = pa.Table.from_pylist(
    [
        {"epoch": epoch, "rank": epoch % 10, "stage": 0, "row_seq": site, "site": site, "name": name}
        for epoch in (10, 11, 12, 23)
        for site, name in ((0, "L1.resid_post"), (1, "logits"))
    ],
    schema=schema_of("sites"),
)
SOURCES = pa.Table.from_pylist(
    [
        {"epoch": epoch, "rank": epoch % 10, "stage": 0, "row_seq": 0, "replica": epoch // 20}
        for epoch in (10, 11, 12, 23)
    ],
    schema=schema_of("sources"),
)


def told(*rows: tuple[int, int, int, int | None], num_rows: int = 4) -> pa.Table:
    """Return rows of `statistics` from (epoch, step, site, checksum)."""
    full: list[dict[str, Any]] = [
        {
            "epoch": epoch,
            "rank": epoch % 10,
            "stage": 0,
            "row_seq": at,
            "step_id": step,
            "site": site,
            "num_rows": num_rows,
            "checksum": checksum,
        }
        for at, (epoch, step, site, checksum) in enumerate(rows)
    ]
    return pa.Table.from_pylist(full, schema=schema_of("statistics"))


def test_the_first_step_and_the_odd_rank_are_named() -> None:
    rows = told(
        *((epoch, step, 0, 100 + step) for epoch in (10, 11, 12) for step in (1, 2, 3)),
        *((epoch, step, 1, -5 + (epoch == 11 and step > 1)) for step in (3, 2, 1) for epoch in (12, 10, 11)),
        (23, 2, 1, 77),  # of another replica, which has other requests
    )
    assert divergence(rows, SITES, SOURCES).to_pylist() == [
        {"site": "L1.resid_post", "num_compared": 3, "num_different": 0, "first_step": None, "ranks": []},
        {"site": "logits", "num_compared": 3, "num_different": 2, "first_step": 2, "ranks": [1]},
    ]


def test_where_no_checksum_is_the_most_common_all_are_named() -> None:
    (found,) = divergence(told((10, 1, 1, 5), (11, 1, 1, 6)), SITES, SOURCES).to_pylist()
    assert (found["num_different"], found["ranks"]) == (1, [0, 1])


def test_what_cannot_be_compared_says_nothing() -> None:
    alone = told((10, 1, 0, 5), (11, 2, 0, 6), (23, 1, 0, 7), (12, 1, 0, None), (99, 1, 0, 8))
    others = pa.concat_tables([told((10, 4, 1, 5)), told((11, 4, 1, 6), num_rows=3)])
    for rows in (alone, others, told()):
        assert divergence(rows, SITES, SOURCES).num_rows == 0


def test_a_store_compares_the_ranks_of_a_stage_or_says_that_it_cannot(tmp_path: Path) -> None:
    tables = simulate(Scenario(seed=1, seconds=1.0))
    write_store(tables, str(tmp_path / "none"))
    with pytest.raises(NothingFound, match="two ranks hold one site whole"):
        open_store(tmp_path / "none").divergence()
    ranks = [row for row in tables["sources"].to_pylist() if row["rank"] >= 0][:2]
    name = next(row["name"] for row in tables["sites"].to_pylist() if row["rank"] == ranks[0]["rank"])
    sites = [
        {"epoch": each["epoch"], "rank": each["rank"], "stage": 0, "row_seq": 900, "site": 900, "name": name}
        for each in ranks
    ]
    both = pa.concat_tables([tables["sites"], pa.Table.from_pylist(sites, schema=schema_of("sites"))])
    step = int(tables["steps"]["step_id"][0].as_py())
    rows = [
        {
            "epoch": each["epoch"],
            "rank": each["rank"],
            "stage": 0,
            "row_seq": 0,
            "step_id": step,
            "site": 900,
            "num_rows": 1,
        }
        | {"checksum": 3 + at}
        for at, each in enumerate(ranks)
    ]
    table = pa.Table.from_pylist(rows, schema=schema_of("statistics"))
    write_store({**tables, "sites": both, "statistics": table}, str(tmp_path / "some"))
    (found,) = open_store(tmp_path / "some").divergence().to_pylist()
    assert (found["site"], found["num_different"], found["first_step"]) == (name, 1, step)
