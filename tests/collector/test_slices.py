"""Rows sorted by run and replica: whose a driver's are, in whatever order drivers, ranks and rows come."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from replica_kit import of_engines

from insitu.records import schema_of
from insitu_collector.requests.records import records_of_tables
from insitu_collector.requests.report import request_report
from insitu_collector.rows.slices import Groups, latest, replicas_of_latest
from insitu_collector.simulate import RUN, Scenario
from insitu_collector.simulate.rows import DRIVER_EPOCH

Replica = int | None


def sources(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([{"run": "r", "unix_anchor_ns": 0} | row for row in rows], schema=schema_of("sources"))


def rank(epoch: int, replica: Replica) -> dict[str, Any]:
    return {"epoch": epoch, "role": "rank", "rank": 0, "stage": 0, "replica": replica}


def driver(epoch: int, replica: Replica, role: str = "driver") -> dict[str, Any]:
    return {"epoch": epoch, "role": role, "rank": -1, "stage": -1, "replica": replica}


def beats(*epochs: int) -> pa.Table:
    rows = [{"epoch": epoch, "rank": -1, "stage": -1, "row_seq": n, "t_ns": n} for n, epoch in enumerate(epochs)]
    return pa.Table.from_pylist(rows, schema=schema_of("health"))


def owners(groups: Groups, *processes: dict[str, Any]) -> dict[int, set[int]]:
    """Return replica -> epochs whose heartbeats it was given."""
    found = groups.sort({"sources": sources(*processes), "health": beats(*(each["epoch"] for each in processes))})
    return {
        replica: set(tables["health"]["epoch"].to_pylist())
        for (_, replica), tables in found.items()
        if "health" in tables
    }


def test_rows_of_drivers_that_name_different_replicas_go_to_theirs() -> None:
    two = [rank(1, 0), rank(2, 1), driver(10, 0), driver(11, 1)]
    assert owners(Groups(), *two) == {0: {1, 10}, 1: {2, 11}}


@pytest.mark.parametrize("said", [0, None])
def test_one_driver_that_names_none_belongs_to_every_replica(said: Replica) -> None:
    """0 is what a driver writes that was told nothing, so alone it names no replica."""
    assert owners(Groups(), rank(1, 0), rank(2, 1), driver(10, said)) == {0: {1, 10}, 1: {2, 10}}


def test_a_driver_of_none_beside_those_of_one_each_and_a_client_belong_to_all() -> None:
    others = [driver(12, None), driver(13, 0, role="client"), driver(14, 1, role="client")]
    found = owners(Groups(), rank(1, 0), rank(2, 1), driver(10, 0), driver(11, 1), *others)
    assert found == {0: {1, 10, 12, 13, 14}, 1: {2, 11, 12, 13, 14}}


def test_a_driver_of_a_replica_that_has_no_rank_yet_waits_for_it() -> None:
    groups = Groups()
    assert owners(groups, rank(1, 0), driver(10, 0), driver(11, 1)) == {0: {1, 10}}
    found = groups.sort({"sources": sources(rank(2, 1))})
    assert sorted(found["r", 1]["sources"]["epoch"].to_pylist()) == [2, 11]
    assert found["r", 1]["health"]["epoch"].to_pylist() == [11]
    assert not found["r", 0]


def test_a_second_driver_takes_nothing_back_and_its_own_rows_are_its_own() -> None:
    groups = Groups()
    assert owners(groups, rank(1, 0), rank(2, 1), driver(10, 0)) == {0: {1, 10}, 1: {2, 10}}, "nobody can know yet"
    assert owners(groups, driver(11, 1)) == {1: {11}}
    found = groups.sort({"health": beats(10, 11)})
    assert {replica: rows["health"]["epoch"].to_pylist() for (_, replica), rows in found.items()} == {0: [10], 1: [11]}


def test_runs_are_split_each_by_itself() -> None:
    alone = [each | {"run": "s", "epoch": each["epoch"] + 100} for each in (rank(1, 0), rank(2, 1), driver(10, 0))]
    found = Groups().sort(
        {
            "sources": sources(rank(1, 0), rank(2, 1), driver(10, 0), driver(11, 1), *alone),
            "health": beats(10, 11, 110),
        }
    )
    given = {group: rows["health"]["epoch"].to_pylist() for group, rows in found.items()}
    assert given == {("r", 0): [10], ("r", 1): [11], ("s", 0): [110], ("s", 1): [110]}


# -- in whatever order ------------------------------------------------------------------------------------------------

processes = st.lists(
    st.builds(lambda is_rank, said: (is_rank, said), st.booleans(), st.sampled_from([None, 0, 1, 2])),
    min_size=1,
    max_size=8,
).map(lambda drawn: [rank(n, said) if is_rank else driver(n, said) for n, (is_rank, said) in enumerate(drawn)])


def given_rows(groups: Groups, parts: list[tuple[list[dict[str, Any]], list[int]]]) -> Counter[tuple[int, int]]:
    """Return how many heartbeats each replica was given of each epoch: (replica, epoch) -> rows."""
    found: Counter[tuple[int, int]] = Counter()
    for new, epochs in parts:
        for (_, replica), tables in groups.sort({"sources": sources(*new), "health": beats(*epochs)}).items():
            if "health" in tables:
                found.update((replica, epoch) for epoch in tables["health"]["epoch"].to_pylist())
    return found


@given(processes, st.data())
def test_where_sources_come_first_any_order_of_rows_is_split_as_the_whole(
    known: list[dict[str, Any]], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.lists(st.sampled_from([each["epoch"] for each in known]), max_size=6), max_size=5))
    whole = given_rows(Groups(), [(known, [epoch for part in rows for epoch in part])])
    assert given_rows(Groups(), [(known, []), *(([], part) for part in rows)]) == whole


@given(processes, st.data())
def test_in_any_order_ranks_and_drivers_above_0_are_given_as_in_the_whole(
    known: list[dict[str, Any]], data: st.DataObject
) -> None:
    """Only of who is every replica's, or was taken to be, the order of sources decides who has the earlier rows."""
    order = data.draw(st.permutations(known))
    parts = [([each], data.draw(st.lists(st.sampled_from([e["epoch"] for e in known]), max_size=3))) for each in order]
    whole = given_rows(Groups(), [(known, [epoch for _, epochs in parts for epoch in epochs])])
    found = given_rows(Groups(), parts)
    sure = {each["epoch"] for each in known if each["role"] == "rank" or each["replica"]}
    assert {key: num for key, num in found.items() if key[1] in sure} == {
        key: num for key, num in whole.items() if key[1] in sure
    }
    for (replica, epoch), num in found.items():
        if epoch not in sure and not whole[replica, epoch]:
            later = [each for each in known if each["role"] == "driver" and each["replica"]]
            assert known[epoch]["replica"] == 0 and later, "it was shared while no other driver was known"
        assert num <= sum(epochs.count(epoch) for _, epochs in parts), "no row is given twice"


# -- of a run ---------------------------------------------------------------------------------------------------------


def test_each_engine_s_requests_are_of_its_replica_alone() -> None:
    found = Groups().sort(of_engines(Scenario(seed=2, seconds=4.0, replicas=2)))
    assert list(found) == [(RUN, 0), (RUN, 1)]
    for (_, replica), tables in found.items():
        assert set(tables["sources"]["epoch"].to_pylist()) == {
            DRIVER_EPOCH + replica,
            1 + 2 * replica,
            2 + 2 * replica,
        }
        told = set(tables["requests"]["request"].to_pylist())
        assert told and {"-r1-" in name for name in told} == {bool(replica)}
        report = request_report(records_of_tables(tables))
        assert report is not None and report.num_requests == len({name for name in told if "warmup" not in name})


def test_the_latest_run_is_given_by_its_first_replica_though_another_began_later_and_before_older_runs() -> None:
    began = {("a", 0): 5, ("b", 0): 30, ("b", 1): 20, ("b", 2): 40, ("ab", 0): 19}
    found = {group: {"sources": sources({"epoch": 1, "unix_anchor_ns": t})} for group, t in began.items()}
    assert replicas_of_latest(found) == [("b", 0), ("b", 1), ("b", 2)]
    assert (latest(found), latest(found, "a"), latest(found, "x")) == (("b", 0), ("ab", 0), None)
    assert replicas_of_latest({}) == replicas_of_latest(found, "x") == []
