"""Rows by time, place, site, request and step, with what their numbers mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from query_kit import RUN, STEP_NS, UNIX, Recorder, capture, entry, site, source, step

from insitu.records import TABLES, schema_of
from insitu.rules.rule import matches
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.rows import named_schema
from insitu_collector.rows.selection import NothingFound
from insitu_collector.store import Store, open_store

SITES = {0: "L0.attn_out", 1: "L0.mlp_out", 2: "L7.mlp_out"}
RANKS = {11: (0, 0, 0), 12: (0, 1, 1), 13: (1, 0, 0)}
"""Epoch -> replica, rank, stage."""
OTHER_RUN = "cd" * 8


def rows_of_ranks() -> list[dict[str, Any]]:
    """Return captures of twelve steps: each rank has each site and three requests."""
    return [
        capture(epoch, number, at, f"r{number % 3}", number, rank=rank, stage=stage)
        for epoch, (_, rank, stage) in RANKS.items()
        for number in range(12)
        for at in SITES
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("rows") / "store"
    recorder = Recorder(path)
    for epoch, (replica, rank, stage) in RANKS.items():
        recorder.write("sources", [source(epoch, rank=rank, stage=stage, replica=replica, tp_rank=rank)])
        recorder.write("sites", [site(epoch, number, name) for number, name in SITES.items()])
    recorder.write("sources", [source(99, run=OTHER_RUN, unix_anchor_ns=UNIX - 10**12)])
    captured = rows_of_ranks()
    for number in range(12):
        of_replicas = [step(epoch, number, [entry(f"r{number % 3}", number, 1)]) for epoch in (11, 13)]
        recorder.write("steps", of_replicas)
        recorder.write("captures", [row for row in captured if row["step_id"] == number])
        summed = {"num_rows": 1, "canary": 1.0}
        recorder.write("summaries", [{"epoch": 11, "rank": 0, "stage": 0, "step_id": number, "site": 2} | summed])
        if number % 4 == 3:
            recorder.seal()
    recorder.write("captures", [capture(99, 5, 0, "r2", 0)])
    recorder.close()
    return open_store(path)


def keys(rows: Any) -> set[tuple[int, int]]:
    found = list(zip(rows["epoch"].to_pylist(), rows["row_seq"].to_pylist(), strict=True))
    assert len(found) == len(set(found))
    return set(found)


def test_a_row_says_who_where_and_what_without_a_join(store: Store) -> None:
    (row,) = store.captures(request="r1", site="L7.*", steps=4, replica=0, rank=1).to_pylist()
    assert row == {
        "run": RUN,
        "replica": 0,
        "rank": 1,
        "stage": 1,
        "tp_rank": 1,
        "site": "L7.mlp_out",
        "layer": 7,
        "shard": "replicated",
        "axis": "tokens",
        "step_id": 4,
        "request": "r1",
        "row": 4,
        "position": 4,
        "dtype": "float32",
        "shape": [8],
        "unix_ns": None,  # only ranks that told of their steps have a time
        "epoch": 12,
        "row_seq": 14,
    }
    (first,) = store.captures(request="r1", site="L7.*", steps=4, replica=0, rank=0).to_pylist()
    assert first["unix_ns"] == UNIX + 4 * STEP_NS


def test_a_window_means_the_steps_that_began_in_it_on_any_rank_of_a_replica(store: Store) -> None:
    found = store.captures(UNIX + 3 * STEP_NS, UNIX + 5 * STEP_NS, columns=["step_id", "rank", "replica"])
    assert set(map(tuple, (row.values() for row in found.to_pylist()))) == {
        (number, rank, replica) for number in (3, 4) for replica, rank, _ in RANKS.values()
    }
    assert store.captures(UNIX + 10**12).num_rows == 0
    assert store.captures("2020-01-01", "2020-01-02").num_rows == 0


def test_the_latest_run_is_meant_unless_another_is_named(store: Store) -> None:
    assert store.captures().num_rows == len(rows_of_ranks())
    assert store.captures(run="cd")["run"].to_pylist() == [OTHER_RUN]
    assert store.captures(run="*").num_rows == len(rows_of_ranks()) + 1
    with pytest.raises(NothingFound, match="has no run 'ee'"):
        store.captures(run="ee")


def test_columns_come_in_the_order_they_are_asked_for(store: Store) -> None:
    assert store.summaries(columns=["site", "step_id", "canary"]).column_names == ["site", "step_id", "canary"]
    assert set(store.summaries(layer=7)["site"].to_pylist()) == {"L7.mlp_out"}
    assert store.summaries(layer=0).num_rows == 0
    batches = list(store.rows("captures", columns=["step_id"], steps=range(2, 4)))
    assert {number for batch in batches for number in batch["step_id"].to_pylist()} == {2, 3}
    assert len(batches) > 2, "it is read batch by batch"


@pytest.mark.parametrize(
    ("table", "asked", "says"),
    [
        ("captures", {"columns": ["colour"]}, "no column 'colour'; those of captures are run, replica"),
        ("captures", {"columns": []}, "no column is asked for"),
        ("captures", {"site": "L[7-1].x"}, r"the range \[7-1\] is empty"),
        ("captures", {"steps": range(0, 9, 2)}, "is no step and no range"),
        ("captures", {"t0": "yesterday"}, "'yesterday' is no time"),
        ("summaries", {"request": "r1"}, "rows of summaries do not say of which request"),
        ("sources", {"steps": 3}, "rows of sources do not say of which steps"),
    ],
)
def test_what_cannot_be_asked_is_one_line(store: Store, table: str, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(BadQuestion, match=says) as error:
        list(store.rows(table, **asked))
    assert "\n" not in str(error.value)


def test_every_table_can_be_asked(store: Store) -> None:
    for table in TABLES:
        columns = named_schema(table).names
        assert {"run", "rank", "stage", "epoch", "row_seq"} <= set(columns)
        assert set(schema_of(table).names) <= set(columns)
        for begin, end in ((None, None), (UNIX, UNIX + 10**9)):
            assert all(batch.schema.names for batch in store.rows(table, begin, end, run="*"))


@given(
    replica=st.sampled_from([None, 0, 1]),
    rank=st.sampled_from([None, 0, 1]),
    layer=st.sampled_from([None, 0, 7, 3]),
    glob=st.sampled_from([None, "L*.mlp_out", "L[0-3].*", "?*", "nothing"]),
    request=st.sampled_from([None, "r0", "r2", "nobody"]),
    steps=st.sampled_from([None, 3, range(2, 9), range(20, 30)]),
    window=st.tuples(st.integers(-1, 13), st.integers(-1, 13)) | st.none(),
)
@settings(max_examples=80, deadline=None)
def test_any_filters_together_find_what_a_look_at_each_row_finds(
    store: Store, replica: Any, rank: Any, layer: Any, glob: Any, request: Any, steps: Any, window: Any
) -> None:
    t0, t1 = (None, None) if window is None else (UNIX + STEP_NS * at for at in window)
    asked: Any = {"replica": replica, "rank": rank, "layer": layer, "site": glob, "request": request, "steps": steps}
    wanted = range(steps, steps + 1) if isinstance(steps, int) else steps

    def is_meant(row: dict[str, Any]) -> bool:
        of, name = RANKS[row["epoch"]], SITES[row["site"]]
        return (
            replica in (None, of[0])
            and rank in (None, of[1])
            and layer in (None, int(name[1]))
            and (glob is None or matches(glob, name, name))
            and request in (None, row["request"])
            and (wanted is None or row["step_id"] in wanted)
            and (window is None or window[0] <= row["step_id"] < window[1])
        )

    place: dict[int, int] = {}
    expected = set()
    for row in rows_of_ranks():
        number = place.get(row["epoch"], 0)
        place[row["epoch"]] = number + 1
        if is_meant(row):
            expected.add((row["epoch"], number))
    assert keys(store.captures(t0, t1, **asked)) == expected


def test_hosts_whose_clocks_were_compared_are_asked_by_one_clock(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    ahead_ns = 3_600 * 10**9
    recorder.write("sources", [source(1), source(2, rank=1, boot_id="other", unix_anchor_ns=UNIX + 5 * 10**9)])
    of_b = {"rank": 1, "stage": 0, "host_a": "boot", "host_b": "other", "error_ns": 1000}
    recorder.write("clocks", [{"epoch": 2, "t_ns": ahead_ns, "offset_ns": ahead_ns} | of_b])
    for number in range(4):
        for epoch, more in ((1, 0), (2, ahead_ns)):
            begin = number * STEP_NS + more
            row = {"rank": epoch - 1, "stage": 0, "t0_ns": begin, "t1_ns": begin + 1, "cls": 4, "step_id": number}
            recorder.write("intervals", [{"epoch": epoch, **row}])
    recorder.close()
    found = open_store(tmp_path).intervals(UNIX + STEP_NS, UNIX + 2 * STEP_NS)
    assert [(row["rank"], row["step_id"], row["t0_unix_ns"]) for row in found.to_pylist()] == [
        (0, 1, UNIX + STEP_NS),
        (1, 1, UNIX + STEP_NS),
    ]
