"""Tiles: each second of each rank is accounted for, and tiles add up to the ledger of the whole."""

from __future__ import annotations

import pyarrow as pa
import pytest

from insitu.records import schema_of
from insitu.vocabulary import LedgerClass
from insitu_collector.ledger import rank_ledger
from insitu_dashboard.tiles import TILE_NS, Tile, shares, tile

SECOND = TILE_NS


def test_tiles_sum_to_the_second_and_to_the_ledger_of_the_whole(tables: dict[str, pa.Table]) -> None:
    begin = int(tables["intervals"]["t0_ns"].to_numpy().min())
    begin += -begin % SECOND
    found = [tile(tables["intervals"], tables["health"], tables["sources"], begin + n * SECOND) for n in range(5)]
    for each in found:
        assert {rank: sum(classes.values()) for rank, classes in each.ns.items()} == {0: SECOND, 1: SECOND}
    whole = rank_ledger(tables["intervals"], tables["health"], tables["sources"], begin, begin + 5 * SECOND)
    for rank in (0, 1):
        for cls in (LedgerClass.WAIT_UPSTREAM, LedgerClass.WAIT_DOWNSTREAM, LedgerClass.NO_DEMAND):
            assert sum(each.ns[rank].get(cls, 0) for each in found) == pytest.approx(whole.ns(rank, cls), abs=5)


def test_shares_sum_to_one_and_the_largest_comes_first() -> None:
    tiles = [
        Tile(0, {0: {LedgerClass.COMPUTE: 700, LedgerClass.HOST: 300}, 1: {LedgerClass.GC: 1000}}),
        Tile(SECOND, {0: {LedgerClass.COMPUTE: 100, LedgerClass.HOST: 900}}),
    ]
    found = shares(tiles, [0])
    assert list(found) == [LedgerClass.HOST, LedgerClass.COMPUTE]
    assert found == {LedgerClass.HOST: 0.6, LedgerClass.COMPUTE: 0.4}
    assert shares(tiles, [5]) == {} == shares([], [0])


def test_a_second_without_any_row_is_unrecorded() -> None:
    sources = pa.Table.from_pylist(
        [{"epoch": 1, "rank": 0, "stage": 0, "row_seq": 0, "role": "rank", "boot_id": "b", "unix_anchor_ns": 0}
         | {"mono_anchor_ns": 0}],
        schema=schema_of("sources"),
    )  # fmt: skip
    empty = {name: schema_of(name).empty_table() for name in ("intervals", "health")}
    assert tile(empty["intervals"], empty["health"], sources, 0).ns == {0: {LedgerClass.UNRECORDED: SECOND}}
