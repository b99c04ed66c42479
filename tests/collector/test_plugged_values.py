"""What other packages' statistics tell of a site is what all its parts tell together, whoever stored them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from insitu.drain import builders
from insitu.identity import Source
from insitu.plugins.discovery import PluginError
from insitu.records import schema_of
from insitu.slabs.harvest import Plugged
from insitu.statistic_plugins import Measure, Statistic
from insitu_collector.values.plugged import plugged_values

NAMES = ("L0.mlp_out", "L1.mlp_out", "logits")


class Mean(Statistic):
    fields = ("num", "total")

    def finalise(self, parts: NDArray[np.float64]) -> Mapping[str, NDArray[Any]]:
        return {"num": parts[:, 0].astype(np.int64), "mean": parts[:, 1] / parts[:, 0]}


MEASURE = Measure("acme.mean", Mean(), Mean.fields, "acme.mean (acme 1.0)")


def stored(source: Source, parts: Sequence[tuple[int, int, float, float]]) -> pa.Table:
    """Return rows as a probe builds them, of (step, site, num, total)."""
    steps, sites, *values = np.array(parts, float).reshape(-1, 4).T
    found = Plugged(MEASURE.name, MEASURE.fields, steps.astype(int), sites.astype(int), np.stack(values, 1))
    batch = builders.plugin_statistics(source, range(len(parts)), [found])
    return pa.Table.from_batches([batch])


def sites_of(*sources: Source) -> pa.Table:
    rows = [
        {"epoch": s.epoch, "rank": s.rank, "stage": s.stage, "row_seq": number, "site": number, "name": name}
        for s in sources
        for number, name in enumerate(NAMES)
    ]
    return pa.Table.from_pylist(rows, schema=schema_of("sites"))


RANKS = Source(epoch=5, run="0" * 16), Source(epoch=6, run="0" * 16, rank=1)
part = st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(1, 9), st.integers(-99, 99))


@given(parts=st.lists(st.tuples(st.integers(0, 1), part), min_size=1, max_size=40), by_step=st.booleans())
def test_parts_of_all_ranks_add_up_by_site_or_by_step(parts: list[tuple[int, Any]], by_step: bool) -> None:
    rows = pa.concat_tables([stored(s, [p for at, p in parts if RANKS[at] is s]) for s in RANKS])
    found = plugged_values(rows, sites_of(*RANKS), MEASURE, by_step=by_step).to_pylist()
    keys = sorted({(site, step if by_step else 0) for _, (step, site, _, _) in parts})
    assert [(row["site"], row.get("step_id", 0)) for row in found] == [(NAMES[site], step) for site, step in keys]
    for row, (site, step) in zip(found, keys, strict=True):
        mine = [p for _, p in parts if p[1] == site and (not by_step or p[0] == step)]
        num, total = sum(p[2] for p in mine), sum(p[3] for p in mine)
        assert (row["num_parts"], row["num"], row["mean"]) == (len(mine), num, pytest.approx(total / num))


def test_a_site_nobody_named_is_left_out_and_what_nobody_can_tell_is_null() -> None:
    rows = stored(RANKS[0], [(0, 2, 0.0, 0.0), (0, 9, 1.0, 1.0)])
    assert plugged_values(rows, sites_of(*RANKS), MEASURE).to_pylist() == [
        {"site": "logits", "num_parts": 1, "num": 0, "mean": None}
    ]


def test_parts_of_another_version_are_not_added_to_these() -> None:
    other = Measure("acme.mean", Mean(), ("num", "sum"), "acme.mean (acme 2.0)")
    with pytest.raises(PluginError, match=r"stored as num, total; acme\.mean \(acme 2\.0\) has num, sum"):
        plugged_values(stored(RANKS[0], [(0, 0, 1, 1)]), sites_of(*RANKS), other)


def test_a_store_without_any_says_how_they_are_taken(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from insitu_collector.rows.selection import NothingFound
    from insitu_collector.simulate import Scenario, simulate, write_store
    from insitu_collector.store import open_store

    write_store(simulate(Scenario(seconds=1.0, warmup_steps=2)), str(tmp_path / "store"))
    store = open_store(tmp_path / "store")
    with pytest.raises(PluginError, match=r"no plug-in of insitu\.statistics has the name 'acme\.mean'"):
        store.plugin_statistics("acme.mean")
    monkeypatch.setattr("insitu_collector.views.notebook.named", lambda group, name: None)
    monkeypatch.setattr("insitu_collector.views.notebook.measure_of", lambda name, plugin: MEASURE)
    with pytest.raises(NothingFound, match=r'has no acme\.mean there; .*take="acme\.mean"'):
        store.plugin_statistics("acme.mean")
