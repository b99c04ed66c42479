"""Verdict `site_never_fired`: whose sites are silent, until they fire; it keeps nobody from judging the rest."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu.sites.never_fired import FIRED, NEVER_FIRED
from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.judge.judgement import Judgement
from insitu_collector.rows.slices import Groups, latest, seconds
from insitu_collector.simulate import Fault, Scenario, simulate
from insitu_collector.verdicts import site_never_fired
from insitu_collector.verdicts.finding import Finding, Verdict, standing

BEGIN = 1_000_000_000_000
KIND = VerdictKind.SITE_NEVER_FIRED


@pytest.fixture(scope="module")
def healthy() -> dict[str, pa.Table]:
    return simulate(Scenario(seed=5, seconds=8.0))


def events(*told: tuple[str, str], rank: int = 1, epoch: int | None = None, t_ns: int = BEGIN) -> pa.Table:
    """Rows of a rank's session, a second apart."""
    rows: list[dict[str, Any]] = [
        {"epoch": 1 + rank if epoch is None else epoch, "rank": rank, "stage": rank, "row_seq": place}
        | {"t_ns": t_ns + place * 10**9, "kind": kind, "step_id": -1, "text": text}
        for place, (kind, text) in enumerate(told)
    ]
    return pa.Table.from_pylist(rows, schema_of("events"))


def look(sources: pa.Table, *parts: pa.Table) -> list[Finding]:
    evidence = Evidence()
    evidence.add({"sources": sources})
    for part in parts:
        evidence.add({"events": part})
    return site_never_fired.look(evidence)


def test_it_names_who_what_and_what_to_do(healthy: dict[str, pa.Table]) -> None:
    (found,) = look(healthy["sources"], events((NEVER_FIRED, "L1.mlp_out, L2.mlp_out")))
    assert (found.kind, found.on_rank, found.on_stage, found.site) == (KIND, 1, 1, "L1.mlp_out")
    assert found.text.startswith("2 sites of rank 1 (stage 1) never fired in the first steps: L1.mlp_out, L2.mlp_out;")
    assert "insitu.tap" in found.remedy
    many = ", ".join(f"site{n}" for n in range(9))
    (found,) = look(healthy["sources"], events((NEVER_FIRED, many)))
    assert "site4 and 4 more;" in found.text


def test_what_fires_after_all_is_taken_back(healthy: dict[str, pa.Table]) -> None:
    told = events((NEVER_FIRED, "a, b"), (FIRED, "a"), (NEVER_FIRED, "c"), (FIRED, "b, c"))
    names = [[finding.text.partition("steps: ")[2].partition(";")[0] for finding in look(healthy["sources"], told[:n])]
             for n in range(5)]  # fmt: skip
    assert names == [[], ["a, b"], ["b"], ["b, c"], []]


@given(st.lists(st.tuples(st.sampled_from([NEVER_FIRED, FIRED]), st.sampled_from(["a", "b", "a, b"])), max_size=8))
def test_rows_in_one_batch_or_many_in_any_order_of_ranks_say_the_same(told: list[tuple[str, str]]) -> None:
    sources = schema_of("sources").empty_table()
    mine, other = events(*told), events((NEVER_FIRED, "x"), rank=0)
    at_once = look(sources, pa.concat_tables([other, mine]).sort_by([("row_seq", "descending")]))
    one_by_one = look(sources, *[mine[n : n + 1] for n in range(len(told))], other)
    assert sorted(at_once, key=lambda f: f.on_rank or 0) == sorted(one_by_one, key=lambda f: f.on_rank or 0)
    assert [finding.site for finding in at_once if finding.on_rank == 0] == ["x"]


def test_a_process_that_took_the_place_speaks_for_it(healthy: dict[str, pa.Table]) -> None:
    sources = healthy["sources"]
    row = next(row for row in sources.to_pylist() if row["rank"] == 1)
    row |= {"epoch": 77, "unix_anchor_ns": row["unix_anchor_ns"] + 1}
    again = pa.concat_tables([sources, pa.Table.from_pylist([row], sources.schema)])
    told = events((NEVER_FIRED, "a"))
    assert look(again, told) == []
    assert [finding.site for finding in look(again, told, events((NEVER_FIRED, "b"), epoch=77))] == ["b"]
    other_model = row | {"model": "another"}
    beside = pa.concat_tables([sources, pa.Table.from_pylist([other_model], sources.schema)])
    assert [finding.site for finding in look(beside, told)] == ["a"]


def judge(tables: dict[str, pa.Table], told: pa.Table) -> list[Verdict]:
    tables = tables | {"events": pa.concat_tables([tables["events"], told])}
    found = Groups().sort(tables)
    group = latest(found)
    assert group is not None
    judgement, verdicts = Judgement("run"), list[Verdict]()
    parts = list(seconds(found[group]))
    for place, part in enumerate(parts):
        verdicts += judgement.look(part, final=place == len(parts) - 1)
    return verdicts


def test_its_incident_closes_when_the_site_fires(healthy: dict[str, pa.Table]) -> None:
    told = events((NEVER_FIRED, "a, b"), (FIRED, "a"), (FIRED, "b"), t_ns=BEGIN + 3 * 10**9)
    verdicts = judge(healthy, told)
    mine = [(v.verdict, v.state, v.site) for v in verdicts if v.kind is KIND]
    assert mine == [
        ("run-site_never_fired-r1-1", "open", "a"),
        ("run-site_never_fired-r1-2", "open", "b"),  # told anew: it says something else now
        ("run-site_never_fired-r1-1", "closed", "a"),
        ("run-site_never_fired-r1-2", "closed", "b"),
    ]


def test_the_rest_is_judged_and_learnt_while_it_stands(healthy: dict[str, pa.Table]) -> None:
    verdicts = judge(healthy, events((NEVER_FIRED, "a"), t_ns=BEGIN))
    assert {(v.kind, v.state) for v in verdicts} == {(KIND, "open"), (VerdictKind.HEALTHY, "open")}


def test_a_slow_stage_is_still_seen() -> None:
    slow = simulate(Scenario(seed=3, seconds=12.0, faults=(Fault("slow", 5.0, 1, ms=12.0),)))
    verdicts = judge(slow, events((NEVER_FIRED, "a"), t_ns=BEGIN + 2 * 10**9))
    assert [v.kind for v in standing(verdicts)] == [VerdictKind.STAGE_LIMITS, KIND]
