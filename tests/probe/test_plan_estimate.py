"""What a plan expects a rule to take is what the rule takes of such steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.plan.estimate import PHASES, Traffic, always_bytes, lines_of, per_s
from insitu.rules.rule import Rule
from insitu.session.row_map import Rows
from insitu.sites.site import Site

SITES = (Site(0, "L0.resid_post", "a"), Site(1, "L1.resid_post", "b"), Site(2, "logits", "c", axis="samples"))
SHAPES = {0: (16, "float32"), 1: (16, "float32"), 2: (100, "float32")}


def step(traffic: Traffic, phase: str) -> list[Rows]:
    if phase == "prefill":
        return [Rows("r0", start=0, count=traffic.prompt, phase=phase, sample_row=0, capture=True)]
    return [
        Rows(f"r{at}", start=at, count=1, position=at, phase=phase, sample_row=at, capture=True)
        for at in range(traffic.batch)
    ]


@given(
    st.builds(Traffic, batch=st.integers(1, 64), prompt=st.integers(1, 300)),
    st.sampled_from(["all", "last", "first:7", "every:1"]),
    st.sampled_from([None, *PHASES]),
    st.sampled_from(["tokens", "samples"]),
    st.sampled_from(PHASES),
)
def test_rows_are_as_many_as_a_step_of_such_traffic_has(
    traffic: Traffic, rows: str, only: str | None, axis: str, phase: str
) -> None:
    rule = Rule(sites="*", requests="all", rows=rows, phase=only)
    assert traffic.rows_taken(rule, axis, phase) == len(rule.select(step(traffic, phase), axis, 0))


def test_shares_of_requests_and_of_positions_are_averages() -> None:
    traffic = Traffic(batch=10, prompt=64, opted_in=0.1)
    assert traffic.rows_taken(Rule(sites="*"), "tokens", "decode") == pytest.approx(1.0)
    assert traffic.rows_taken(Rule(sites="*", requests=0.5), "tokens", "decode") == pytest.approx(5.5)
    assert traffic.rows_taken(Rule(sites="*", requests="all", rows="every:16"), "tokens", "prefill") == 4
    assert traffic.rows_taken(Rule(sites="*", requests="all", rows="every:16"), "tokens", "decode") == 10 / 16


def test_steps_of_a_rank_that_always_has_work_fill_its_time() -> None:
    traffic = Traffic(decode_ms=20, prefill_ms=200, prefill_share=0.1)
    rates = traffic.steps_per_s
    assert rates["decode"] * 0.020 + rates["prefill"] * 0.200 == pytest.approx(1.0)
    assert rates["prefill"] / sum(rates.values()) == pytest.approx(0.1)
    assert per_s({"decode": 3.0, "prefill": 5.0}, traffic) == 3 * rates["decode"] + 5 * rates["prefill"]


def test_each_site_is_counted_under_the_first_rule_of_a_kind_that_names_it() -> None:
    rules = [
        Rule(sites="L0.*", requests="all"),
        Rule(sites="*", take="summary", every=8, phase="prefill"),
        Rule(sites="L*.resid_post", requests="all", max_bytes_per_s=100),
        Rule(sites="L*"),
    ]
    first, summary, second, last = lines_of(rules, SITES, SHAPES, Traffic())
    assert [site.name for site in second.sites] == ["L1.resid_post"]
    assert (len(summary.sites), second.num_named, last.sites, last.bytes_per_s) == (3, 2, (), 0)
    assert summary.step_bytes["decode"] == 0 < summary.step_bytes["prefill"]
    assert first.step_bytes == second.step_bytes
    assert (second.bytes_per_s, second.is_bounded, first.is_bounded) == (100, True, False)
    assert second.asked_bytes_per_s == pytest.approx(first.bytes_per_s)


def test_casts_and_the_largest_alone_take_less_and_unknown_widths_are_named() -> None:
    rules = [[Rule(sites="logits", requests="all", topk=topk, cast=cast)] for topk, cast in ((None, None), (4, "bf16"))]
    whole, top = (lines_of(each, SITES, SHAPES, Traffic())[0] for each in rules)
    assert whole.step_bytes["decode"] - top.step_bytes["decode"] == 8 * (100 * 4 - 4 * 6)
    (line,) = lines_of([Rule(sites="L*", requests="all")], SITES, {0: SHAPES[0]}, Traffic())
    assert line.unknown == ("L1.resid_post",)


def test_without_rules_there_are_summaries_and_steps() -> None:
    few, many = always_bytes(1, Traffic(batch=1)), always_bytes(3, Traffic(batch=9))
    assert few["decode"] == few["prefill"]
    assert many["decode"] - many["prefill"] == 8 * 36
