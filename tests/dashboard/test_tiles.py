"""Tiles as an array: all time of each rank is in it once, and it adds up to the ledger of the whole."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger.classes import NOBODY, PLACE
from insitu_collector.ledger.columns import Grid
from insitu_collector.ledger.tile import Tile
from insitu_collector.ledger.tiles import TileLedger
from insitu_collector.ledger.window import CLASSES, rank_ledger
from insitu_collector.requests.latency import SECOND_NS
from insitu_dashboard.tiles import shares, times_of

Entry = tuple[int, LedgerClass, int]
RANKS = [5, 0, 3]


def tile(t0_ns: int, entries: list[Entry]) -> Tile:
    """A tile that knows the ranks it has entries of, and no other."""
    ranks = np.unique(np.array([rank for rank, _, _ in entries], np.int64))
    rank = np.searchsorted(ranks, [rank for rank, _, _ in entries]).astype(np.int16)
    cls = np.array([PLACE[cls] for _, cls, _ in entries], np.int8)
    ns, none = np.array([ns for _, _, ns in entries], np.int64), np.zeros(len(ranks), np.int64)
    grid = Grid(ranks, none, True, lambda _rank, _peer, t_ns: np.zeros_like(t_ns))
    return Tile(t0_ns, SECOND_NS, grid, rank, cls, np.full(len(entries), NOBODY, np.int32), ns, none, none)


entries = st.lists(st.tuples(st.sampled_from(RANKS), st.sampled_from(CLASSES), st.integers(1, SECOND_NS)), max_size=9)


@given(st.lists(entries, max_size=5))
def test_every_entry_is_in_its_place_whatever_ranks_a_tile_knows(of: list[list[Entry]]) -> None:
    found = times_of([tile(n * SECOND_NS, few) for n, few in enumerate(of)], RANKS)
    expected = np.zeros((len(of), len(RANKS), len(CLASSES)), np.int64)
    for n, few in enumerate(of):
        for rank, cls, ns in few:
            expected[n, RANKS.index(rank), PLACE[cls]] += ns
    assert np.array_equal(found.ns, expected)
    assert found.t0_ns.tolist() == [n * SECOND_NS for n in range(len(of))]
    assert (found.t1_ns - found.t0_ns == SECOND_NS).all()


def test_they_sum_to_the_second_and_to_the_ledger_of_the_whole(tables: dict[str, pa.Table]) -> None:
    ledger = TileLedger()
    ledger.add(tables)
    ledger.settle()
    begin, end = 1003 * SECOND_NS, 1008 * SECOND_NS
    found = times_of(ledger.tiles(SECOND_NS, begin, end), [1, 0])
    assert found.ns.shape == (5, 2, len(CLASSES))
    assert (found.ns.sum(axis=2) == SECOND_NS).all()
    whole = rank_ledger(tables["intervals"], tables["health"], tables["sources"], begin, end)
    for cls in (LedgerClass.WAIT_UPSTREAM, LedgerClass.WAIT_DOWNSTREAM, LedgerClass.NO_DEMAND):
        assert found.ns[:, :, PLACE[cls]].sum(axis=0).tolist() == [whole.ns(1, cls), whole.ns(0, cls)]


def test_shares_sum_to_one_and_the_largest_comes_first() -> None:
    ns = np.zeros(len(CLASSES), np.int64)
    assert shares(ns) == {}
    ns[PLACE[LedgerClass.COMPUTE]], ns[PLACE[LedgerClass.OTHER]] = 800, 1200
    found = shares(ns)
    assert list(found) == [LedgerClass.OTHER, LedgerClass.COMPUTE]
    assert found == {LedgerClass.OTHER: 0.6, LedgerClass.COMPUTE: 0.4}
