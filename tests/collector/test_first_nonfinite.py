"""Verdict `first_nonfinite`: the first site in order of execution, across ranks, once for each origin."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from record_kit import table

from insitu_collector.evidence import Evidence
from insitu_collector.verdicts.first_nonfinite import PATIENCE_NS, NonfiniteWatch

S = 1_000_000_000
NAMES = ("L{0}.attn_out", "L{0}.mlp_out", "L{0}.resid_post", "L{1}.attn_out", "L{1}.mlp_out", "L{1}.resid_post")
NAN = float("nan")


class World:
    """Two stages of two layers; the last also has logits. Rows go in as the test says."""

    def __init__(self) -> None:
        self.evidence = Evidence()
        self.watch = NonfiniteWatch()
        self.seq = [0, 0]
        sites = []
        for rank in (0, 1):
            names = [name.format(2 * rank, 2 * rank + 1) for name in NAMES] + (["logits"] if rank else [])
            for number, name in enumerate(names):
                layer = int(name[1]) if name[0] == "L" else None
                axis = "samples" if name == "logits" else "tokens"
                sites.append({"rank": rank, "site": number, "name": name, "layer": layer, "axis": axis})
        sources = [
            {"rank": r, "role": "rank", "boot_id": "b", "unix_anchor_ns": 0, "mono_anchor_ns": 0} for r in (0, 1)
        ]
        self.evidence.add({"sources": table("sources", sources), "sites": table("sites", sites)})

    def step(self, step_id: int, at_s: float, requests: str = "ab", phase: int = 1) -> None:
        rows = [
            {"request": name, "row": n, "count": 1, "position": 9, "phase": phase, "sample_row": n}
            for n, name in enumerate(requests)
        ]
        row = {"rank": 0, "step_id": step_id, "t0_ns": int(at_s * S), "phase": phase, "num_rows": 2, "rows": rows}
        self.evidence.add({"steps": table("steps", [row])})

    def summaries(self, rank: int, step_id: int, first_bad: int | None, bad: Iterable[int] = (1,)) -> None:
        """Boundary rows of a healthy step; every site of a flagged one, not finite from `first_bad` on."""
        last = 6 if rank else 5
        numbers = range(last + 1) if first_bad is not None else [last]
        rows = []
        for number in numbers:
            spoilt = first_bad is not None and number >= first_bad
            flags = list(bad) if spoilt and number in (5, 6) else None
            canary = NAN if spoilt else 1.0
            rows.append({"rank": rank, "step_id": step_id, "site": number, "canary": canary, "nonfinite_rows": flags})
            rows[-1]["row_seq"] = self.seq[rank]
            self.seq[rank] += 1
        self.evidence.add({"summaries": table("summaries", rows)})

    def told(self) -> list[tuple[int | None, str | None, int | None, tuple[str, ...]]]:
        return [(f.on_rank, f.site, f.step_id, f.requests) for f in self.watch.look(self.evidence)]


def test_the_first_site_that_is_not_finite_is_named_with_its_requests() -> None:
    world = World()
    world.step(5, 10)
    world.summaries(0, 5, None)
    world.summaries(1, 5, first_bad=4)
    (found,) = world.watch.look(world.evidence)
    assert (found.on_rank, found.on_stage, found.layer, found.site) == (1, 1, 3, "L3.mlp_out")
    assert (found.step_id, found.phase, found.requests, found.confidence) == (5, "decode", ("b",), 1.0)


def test_the_earliest_stage_wins_in_whatever_order_rows_come() -> None:
    world = World()
    world.step(4, 9.9)
    world.summaries(1, 5, first_bad=0)
    assert world.told() == []
    world.step(5, 10)
    assert world.told() == []
    world.summaries(0, 5, first_bad=1)
    assert world.told() == [(0, "L0.mlp_out", 5, ("b",))]


def test_an_answer_waits_for_earlier_stages_and_then_says_that_they_never_came() -> None:
    world = World()
    world.step(5, 10)
    world.summaries(1, 5, first_bad=0)
    assert world.told() == []
    world.step(6, 10 + PATIENCE_NS / S + 0.1)
    (found,) = world.watch.look(world.evidence)
    assert found.confidence == 0.5
    assert "never came" in found.text


def test_later_steps_of_the_same_origin_are_one_incident() -> None:
    world = World()
    for step, rank, first in ((5, 0, 1), (6, 0, 3), (7, 1, 0)):
        world.step(step, 10 + step)
        world.summaries(0, step, first if rank == 0 else None)
        world.summaries(1, step, 0)
    assert world.told() == [(0, "L0.mlp_out", 5, ("b",))]


def test_what_spreads_through_the_cache_to_other_requests_is_not_a_second_origin() -> None:
    world = World()
    world.step(5, 10, "ab")
    world.summaries(0, 5, 1)
    world.summaries(1, 5, 0)
    assert world.told() == [(0, "L0.mlp_out", 5, ("b",))]
    world.step(60, 30, "cd")
    world.summaries(0, 60, 3)  # L1.attn_out: it read what layer 0 left in the cache
    world.summaries(1, 60, 0)
    assert [site for _, site, _, _ in world.told()] == ["L0.mlp_out"]


def test_another_fault_later_is_told_beside_the_first() -> None:
    world = World()
    world.step(5, 10, "ab")
    world.summaries(0, 5, 1)
    world.summaries(1, 5, 0)
    world.told()
    world.step(60, 30, "cd")
    world.summaries(0, 60, None)
    world.summaries(1, 60, 4)
    assert [(rank, site) for rank, site, _, _ in world.told()] == [(0, "L0.mlp_out"), (1, "L3.mlp_out")]


@pytest.mark.parametrize("first_bad", [6])
def test_logits_rows_are_found_by_the_samples_axis(first_bad: int) -> None:
    world = World()
    world.step(5, 10, "xy", phase=0)
    world.summaries(0, 5, None)
    world.summaries(1, 5, first_bad, bad=[0])
    (found,) = world.watch.look(world.evidence)
    assert (found.site, found.layer, found.requests, found.phase) == ("logits", None, ("x",), "prefill")


def test_finite_steps_say_nothing() -> None:
    world = World()
    world.step(5, 10)
    world.summaries(0, 5, None)
    world.summaries(1, 5, None)
    assert world.told() == []
