"""Rules at work on a model that runs: which rows are taken, in which form, and what is left out is counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.row_forms import decoded
from insitu.rules.in_force import InForce
from insitu.rules.rule import RuleError
from insitu.rules.sampling import is_sampled
from insitu.session.step import StepRecord
from insitu.sites.site import Site
from insitu.slabs.harvest import Reading
from insitu.slabs.slab import Plan
from insitu.testing import Recording

RUN = "0123456789abcdef"
WIDTH = 6


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")  # however long these steps take, the governor leaves none out


def two_sites() -> nn.Sequential:
    return nn.Sequential(nn.Identity(), nn.Identity())


def rule(sites: str = "output", **fields: Any) -> insitu.Rule:
    return insitu.Rule(sites=sites, **{"requests": "all", **fields})


def taken(
    recording: Recording,
    rules: Sequence[insitu.Rule],
    steps: Sequence[tuple[torch.Tensor, Sequence[insitu.Rows] | None]],
    phase: str | None = None,
    **options: Any,
) -> insitu.Session:
    """Run steps 1, 2, ... after one that teaches the widths; return the closed session."""
    net = two_sites()
    with torch.inference_mode(), insitu.attach(net, to=recording, rules=rules, **options) as session:
        with session.step(0, num_rows=1):
            net(steps[0][0][:1])
        for step, (x, rows) in enumerate(steps, 1):
            with session.step(step, rows=rows, phase=phase):
                net(x)
    return session


def found(recording: Recording) -> dict[tuple[int, str, int], tuple[list[float], list[int] | None]]:
    """Return by step, site and row what was kept: values and places."""
    names = {row["site"]: row["name"] for row in recording.rows("sites")}
    rows = {}
    for row in recording.rows("captures"):
        values, places = decoded(row["dtype"], row["data"])
        assert row["shape"] == [len(values)]
        rows[row["step_id"], names[row["site"]], row["row"]] = (
            values.tolist(),
            None if places is None else places.tolist(),
        )
    return rows


def one_map(count: int) -> list[insitu.Rows]:
    return [insitu.Rows("a", start=0, count=count)]


@pytest.mark.parametrize(
    ("cast", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.float8_e4m3fn)]
)
def test_rows_are_cast_as_torch_casts_them(insitu_records: Recording, cast: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.randn(5, WIDTH) * 7
    taken(insitu_records, [rule(cast=cast)], [(x, one_map(5))])
    rows = found(insitu_records)
    assert {row["dtype"] for row in insitu_records.rows("captures")} == {str(dtype).removeprefix("torch.")}
    assert [rows[1, "output", row][0] for row in range(5)] == x.to(dtype).float().tolist()


def test_a_float8_holds_what_is_too_large_as_its_largest_and_what_is_not_finite_as_nan(
    insitu_records: Recording,
) -> None:
    x = torch.tensor([[500.0, -1e9, float("inf"), -float("inf"), float("nan"), 448.0]])
    taken(insitu_records, [rule(cast="fp8")], [(x, one_map(1))])
    values = found(insitu_records)[1, "output", 0][0]
    assert np.array_equal(values, [448.0, -448.0, np.nan, np.nan, np.nan, 448.0], equal_nan=True)


def test_integers_are_what_they_are(insitu_records: Recording) -> None:
    x = torch.arange(2 * WIDTH).reshape(2, WIDTH)
    taken(insitu_records, [rule("0", cast="fp8")], [(x, one_map(2))])
    assert found(insitu_records)[1, "0", 1][0] == x[1].tolist()


@pytest.mark.parametrize("cast", [None, "bf16", "fp8"])
def test_only_the_largest_of_each_row_are_kept_with_their_places(insitu_records: Recording, cast: str | None) -> None:
    torch.manual_seed(4)
    x = torch.randn(4, 50)
    session = taken(insitu_records, [rule(topk=3, cast=cast)], [(x, one_map(4))])
    assert session.stats().dropped == {}
    dtype = {None: torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[cast]
    values, places = torch.topk(x, 3, 1)
    rows = found(insitu_records)
    for at in range(4):
        assert rows[1, "output", at] == (values[at].to(dtype).float().tolist(), places[at].tolist())


def test_a_row_with_fewer_values_than_are_asked_for_is_kept_in_order_of_size(insitu_records: Recording) -> None:
    x = torch.tensor([[1.0, 3.0, 2.0]])
    taken(insitu_records, [rule(topk=64)], [(x, one_map(1))])
    assert found(insitu_records)[1, "output", 0] == ([3.0, 2.0, 1.0], [1, 2, 0])


def test_rows_of_one_phase_are_those_of_requests_in_it(insitu_records: Recording) -> None:
    rows = [insitu.Rows("a", 0, 3, phase="prefill"), insitu.Rows("b", 3, 1, phase="decode")]
    taken(insitu_records, [rule("0", phase="decode"), rule("1", phase="prefill")], [(torch.ones(4, WIDTH), rows)])
    assert sorted(found(insitu_records)) == [(1, "0", 3), (1, "1", 0), (1, "1", 1), (1, "1", 2)]


def test_of_a_step_without_a_row_map_only_rules_for_all_requests_take_rows(insitu_records: Recording) -> None:
    rules = [rule("0"), insitu.Rule(sites="1"), rule("output", phase="decode")]
    taken(insitu_records, rules, [(torch.ones(2, WIDTH), None)], phase="prefill")
    assert sorted(found(insitu_records)) == [(1, "0", 0), (1, "0", 1)]


def test_statistics_of_one_phase_are_of_steps_of_it(insitu_records: Recording) -> None:
    net = two_sites()
    rules = [insitu.Rule(sites="*", take="summary", every=2, phase="decode")]
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=rules) as session:
        for step in range(40):
            with session.step(step, phase=("prefill", "decode", "mixed", None)[step % 4]):
                net(torch.ones(1, WIDTH))
    told = {row["step_id"] for row in insitu_records.rows("statistics")}
    assert told == {step for step in range(1, 40, 4) if is_sampled(RUN, step, 2)}


def test_beyond_its_bytes_a_second_a_rule_leaves_whole_steps_out(insitu_records: Recording) -> None:
    rules = [rule("0", max_bytes_per_s=1), rule("1")]
    steps = [(torch.ones(3, WIDTH), one_map(3))] * 5
    session = taken(insitu_records, rules, steps)
    rows = found(insitu_records)
    assert [key for key in rows if key[1] == "0"] == [(1, "0", 0), (1, "0", 1), (1, "0", 2)]
    assert len([key for key in rows if key[1] == "1"]) == 5 * 3, "another rule's rows are no matter of it"
    stats = session.stats()
    assert (stats.left_out, stats.dropped, stats.produced["captures"]) == (4 * 3, {}, 6 * 3)
    events = insitu_records.rows("events", kind="rows_left_out")
    assert events[-1]["text"].endswith(" rows were left out: max_bytes_per_s of their rules was reached")


def test_a_step_without_a_row_map_pays_for_the_rows_that_were_last_seen() -> None:
    # A row is 24 bytes. What is not known yet counts as the most, 4 rows: 96 of the first second's 97 bytes.
    plan = Plan((Site(0, "a", "a"),), (rule("a", max_bytes_per_s=97),), max_rows=4)
    rules = InForce(plan, torch.device("cpu"))
    rules.learn({0: (WIDTH, torch.float32)})

    def is_taken(t_ns: int) -> tuple[bool, int]:
        record = StepRecord(0, 0, None, t_ns, None, None, 0, 0)
        return bool(rules.choose_rows(record)), record.num_left_out

    assert is_taken(0) == (True, 0)
    records = [StepRecord(0, 0, None, 0, None, None, 0, 0, row_slab=0)]
    none = np.zeros((1, 1), np.float32)
    load = none.astype(np.int32)
    rules.note_rows(Reading(np.array([0]), none == 0, np.array([[2]]), none, none, none, load), records)
    assert is_taken(0) == (True, 0), "one byte is left, and two rows may overdraw it"
    assert is_taken(480_000_000) == (False, 2)
    assert is_taken(490_000_000) == (True, 0)


def test_rows_that_find_no_slab_are_counted_at_the_sites_of_their_rule(insitu_records: Recording) -> None:
    net, rows = two_sites(), [insitu.Rows("a", start=0, count=3, capture=True)]
    rules = [rule("0", rows="last"), insitu.Rule(sites="1")]
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=rules) as session:
        net(torch.ones(1, WIDTH))
        observer = session._observer
        assert observer is not None and observer.row_slabs is not None
        ring = observer.row_slabs.ring
        while ring.take() is not None:
            pass
        with session.step(rows=rows):
            net(torch.ones(3, WIDTH))
        session.flush()
        ring.free(ring.size)
    assert session.stats().dropped == {"captures": {"slab_full": 1 + 3}}


def test_a_site_whose_rows_change_their_width_is_said_once_and_disturbs_no_other(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "insitu"):
        steps = [(torch.ones(2, WIDTH), one_map(2)), *[(torch.ones(2, 9), one_map(2))] * 3]
        session = taken(insitu_records, [rule("0")], steps)
    assert sum("no rows of 0 (" in record.message for record in caplog.records) == 1
    assert sorted(found(insitu_records)) == [(1, "0", 0), (1, "0", 1)], "of later steps there is nothing, not old rows"
    assert session.coverage().never_fired == []


def test_a_rule_that_counts_off_more_than_a_slab_holds_is_refused_at_attach(insitu_records: Recording) -> None:
    net = two_sites()
    with pytest.raises(RuleError, match=r"max_rows is 8"):
        insitu.attach(net, to=insitu_records, rules=[rule(rows="first:9")], max_rows=8)
    assert type(net) is nn.Sequential
