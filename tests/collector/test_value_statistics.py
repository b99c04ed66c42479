"""Statistics that ranks and steps told are read as one row a site, in order of execution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from insitu.records import schema_of
from insitu_collector.compare.sides import Recorded
from insitu_collector.rows.selection import NothingFound
from insitu_collector.simulate import Scenario, simulate, write_store
from insitu_collector.store import open_store
from insitu_collector.values.statistics import beside, value_statistics

ENTROPY = {"num": 2, "mean": 1.5, "m2": 0.5, "low": 1.0, "high": 2.0}
ROW: dict[str, Any] = {
    "stage": 0,
    "num_rows": 2,
    "num_values": 8,
    "num_nan": 1,
    "num_inf": 1,
    "num_zero": 3,
    "num_near_zero": 3,
    "num_outlier": 0,
    "num_beyond": 1,
    "num_e4m3_over": 0,
    "num_e4m3_under": 0,
    "num_e5m2_over": 0,
    "num_e5m2_under": 0,
    "first_bad_row": 1,
    "absmax": 8.0,
    "absmax_row": 0,
    "smallest": 2.0,
    "mean": 1.0,
    "m2": 6.0,
    "m3": 0.0,
    "m4": 18.0,
    "octaves": [0] * 18 + [3] + [0] * 13,
    "channels": [{"channel": 3, "absmax": 8.0}, {"channel": 0, "absmax": 2.0}],
}


def statistics(*rows: dict[str, Any]) -> pa.Table:
    full = [{"rank": row["epoch"], "row_seq": at, **ROW, **row} for at, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=schema_of("statistics"))


SITES = pa.Table.from_pylist(
    [
        {"epoch": epoch, "rank": epoch, "stage": stage, "row_seq": site, "site": site, "name": name}
        for epoch, stage, site, name in (
            (2, 1, 0, "L1.resid_post"),
            (2, 1, 1, "logits"),
            (1, 0, 4, "L0.resid_post"),
            (1, 0, 3, "embed"),
            (3, 1, 1, "logits"),
        )
    ],
    schema=schema_of("sites"),
)


def test_ranks_and_steps_add_up_and_sites_come_in_order_of_execution() -> None:
    rows = statistics(
        {"epoch": 2, "step_id": 5, "site": 1, "entropy": ENTROPY},
        {"epoch": 3, "step_id": 5, "site": 1, "mean": 3.0, "absmax": 16.0},
        {"epoch": 1, "step_id": 5, "site": 4},
        {"epoch": 1, "step_id": 9, "site": 4, "smallest": 1.0},
    )
    first, logits = value_statistics(rows, SITES).to_pylist()
    assert (first["site"], first["num_parts"], first["num_values"]) == ("L0.resid_post", 2, 16)
    assert (first["first_bad_step"], first["first_bad_row"], first["absmax_step"]) == (5, 1, 5)
    assert first["dynamic_range"] == 3.0 and first["entropy"] is None
    assert first["octaves"][18] == 6
    assert (logits["site"], logits["mean"], logits["absmax"]) == ("logits", 2.0, 16.0)
    assert logits["std"] == pytest.approx((2 * 6.0 / 12 + 1.0) ** 0.5)
    assert (logits["entropy"], logits["entropy_std"], logits["entropy_max"]) == (1.5, 0.5, 2.0)
    assert logits["zero_share"] == 0.5 and logits["beyond_channels"] == [3]


def test_casts_and_scores_add_up_and_rows_of_an_earlier_version_have_none() -> None:
    scores = {"num": 2, "mean": 3.0, "m2": 8.0, "low": 1.0, "high": 5.0}
    ids = {"num": 2, "mean": 7.0, "m2": 0.0, "low": 7.0, "high": 7.0}
    rows = statistics(
        {"epoch": 2, "step_id": 5, "site": 1, "logsumexp": scores, "top_id": ids, "cast_e4m3": CAST},
        {"epoch": 3, "step_id": 5, "site": 1, "cast_e4m3": {**CAST, "num": 12, "lost": 0}},
        {"epoch": 1, "step_id": 5, "site": 4},
    )
    first, logits = value_statistics(rows, SITES).to_pylist()
    assert (logits["e4m3_mse"], logits["e4m3_noise"], logits["e4m3_lost_share"]) == (1.0 / 16, 1.0 / 8, 1 / 16)
    assert (logits["z_loss"], logits["top_id_min"], logits["top_id_max"]) == (3.0**2 + 8.0 / 2, 7.0, 7.0)
    assert all(first[name] is None for name in ("e4m3_mse", "bf16_noise", "e5m2_lost_share", "z_loss", "top_id_max"))
    assert not {"top_id", "top_id_std", "checksum"} & set(logits)


CAST = {"num": 4, "lost": 1, "noise": 0.5, "signal": 4.0}


def test_by_step_ranks_alone_add_up() -> None:
    rows = statistics(
        {"epoch": 3, "step_id": 7, "site": 1},
        {"epoch": 2, "step_id": 5, "site": 1},
        {"epoch": 2, "step_id": 7, "site": 1},
    )
    found = value_statistics(rows, SITES, by_step=True).to_pylist()
    assert [(row["site"], row["step_id"], row["num_parts"]) for row in found] == [("logits", 5, 1), ("logits", 7, 2)]


def test_what_nobody_can_tell_is_null() -> None:
    nothing = dict.fromkeys(("first_bad_row", "absmax", "absmax_row", "smallest", "mean", "m2", "m3", "m4"))
    none = dict.fromkeys(("num_zero", "num_near_zero", "num_beyond"), 0)
    row = {"epoch": 1, "step_id": 1, "site": 3, "num_values": 2, "channels": [], "octaves": [0] * 32, **nothing, **none}
    (found,) = value_statistics(statistics(row), SITES).to_pylist()
    told = {name for name, value in found.items() if value is not None}
    assert told == {
        *("site", "num_parts", "num_rows", "num_values", "num_nan", "num_inf", "sum", "octaves"),
        *("outlier_channels", "beyond_channels"),
    }


def test_a_site_nobody_named_and_an_empty_table_say_nothing() -> None:
    assert value_statistics(statistics({"epoch": 8, "step_id": 1, "site": 1}), SITES).num_rows == 0
    assert value_statistics(statistics(), SITES).num_rows == 0


def test_a_store_without_statistics_says_how_to_get_them(tmp_path: Path) -> None:
    write_store(simulate(Scenario(seed=1, seconds=1.0)), str(tmp_path))
    with pytest.raises(NothingFound, match=r'take="summary"'):
        open_store(tmp_path).statistics()


def test_two_sides_are_compared_by_sites_that_only_sampled_steps_tell(tmp_path: Path) -> None:
    tables = simulate(Scenario(seed=2, seconds=6.0))
    step_ids = sorted(set(tables["steps"]["step_id"].to_pylist()))
    source = next(row for row in tables["sources"].to_pylist() if row["rank"] == 0)
    inner = next(row for row in tables["sites"].to_pylist() if row["rank"] == 0 and row["name"].endswith("mlp_out"))
    told = next(row for row in tables["summaries"].to_pylist())
    whose = {"epoch": source["epoch"], "rank": 0}
    rows = [
        {
            **whose,
            "step_id": step,
            "site": inner["site"],
            "num_nan": 0,
            "num_inf": 0,
            "mean": float(step > step_ids[-40]),
        }
        for step in step_ids[-80:]
    ]
    rows.append({"epoch": told["epoch"], "rank": told["rank"], "step_id": told["step_id"], "site": told["site"]})
    write_store({**tables, "statistics": statistics(*rows)}, str(tmp_path))
    sites = Recorded(open_store(tmp_path)).whole().sites
    assert sites[inner["name"]].num_steps == 80
    assert sites[inner["name"]].row_sum.mean == pytest.approx(8 / 2 * 39 / 80)
    assert sites[inner["name"]].num_nonfinite == 0


def test_steps_of_a_longer_period_weigh_more_and_no_step_more_than_another() -> None:
    rows = statistics(
        *({"epoch": 1, "step_id": step, "site": 3, "mean": 0.0} for step in range(0, 8, 2)),  # half of eight steps
        {"epoch": 1, "step_id": 8, "site": 3, "mean": 5.0},  # one of eight
        {"epoch": 1, "step_id": 8, "site": 4, "mean": 7.0},
    )
    who = {"epoch": 1, "rank": 0, "stage": 0, "take": "summary", "every": 2}
    periods = [(step, 2, [3]) for step in range(0, 8, 2)] + [(8, 8, [3, 4])]
    told = [
        {**who, "row_seq": at, "step_id": step, "period": period, "sites": sites}
        for at, (step, period, sites) in enumerate(periods)
    ]
    sampling = pa.Table.from_pylist(told, schema=schema_of("sampling"))
    first, other = value_statistics(rows, SITES, sampling=sampling).to_pylist()
    assert (first["mean"], other["mean"]) == (2.5, 7.0)
    assert first["num_parts"] == 5
    assert (first["num_values"], other["num_values"]) == (8 * 8, 8), "as if the shorter period had gone on"
    plain = value_statistics(rows, SITES).to_pylist()
    assert plain[0]["mean"] == 1.0
    by_step = value_statistics(rows, SITES, by_step=True, sampling=sampling)
    assert by_step.equals(value_statistics(rows, SITES, by_step=True)), "a step stands for itself"


def test_a_step_that_summaries_tell_is_not_told_again() -> None:
    flagged = {"epoch": 1, "rank": 1, "stage": 0, "row_seq": 0, "step_id": 4, "site": 3, "canary": float("nan")}
    boundary = {**flagged, "site": 4, "canary": 1.0, "absmax": 2.0}
    summaries = pa.Table.from_pylist([flagged, boundary], schema=schema_of("summaries"))
    rows = [{"epoch": 1, "step_id": step, "site": site} for step in (4, 5) for site in (3, 4)]
    found = beside(summaries, statistics(*rows))
    assert [(row["step_id"], row["site"]) for row in found.to_pylist()] == [(4, 3), (4, 4), (5, 3)]
    assert beside(summaries, statistics()).num_rows == 2
    assert beside(summaries.slice(0, 0), statistics(*rows)).num_rows == 4
