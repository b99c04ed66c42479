"""Rules pick sites by glob and rows by request, axis and position."""

import re
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.rules.head_sampling import lot_of
from insitu.rules.rule import Rule, RuleError, check_fit, matches, select_within
from insitu.session.row_map import Rows

STEP = [
    Rows("a", start=0, count=3, position=10, sample_row=1, capture=True),
    Rows("b", start=3, count=1, position=7, sample_row=0),
    Rows("c", start=4, count=2, position=0, capture=True),
]


@pytest.mark.parametrize(
    ("glob", "name", "found"),
    [
        ("L*.mlp_out", "L12.mlp_out", True),
        ("L*.mlp_out", "L12.attn_out", False),
        ("L[0-7].attn_out", "L7.attn_out", True),
        ("L[0-7].attn_out", "L8.attn_out", False),
        ("L[8-12].attn_out", "L10.attn_out", True),
        ("logits", "logits", True),
        ("module:model.*.mlp", "L1.mlp_out", True),
        ("module:lm_head", "logits", False),
    ],
)
def test_a_glob_names_sites(glob: str, name: str, found: bool) -> None:
    assert matches(glob, name, "model.layers.1.mlp") is found


@pytest.mark.parametrize(
    ("rows", "places"),
    [
        ("all", [("a", 0, 10), ("a", 1, 11), ("a", 2, 12), ("c", 4, 0), ("c", 5, 1)]),
        ("last", [("a", 2, 12), ("c", 5, 1)]),
        ("first:1", [("a", 0, 10), ("c", 4, 0)]),
        ("every:4", [("a", 2, 12), ("c", 4, 0)]),
    ],
)
def test_opted_in_rows_of_the_tokens_axis(rows: str, places: list[tuple[str, int, int]]) -> None:
    found = Rule(sites="*", rows=rows).select(STEP, "tokens", 6)
    assert [(place.request, place.row, place.position) for place in found] == places


def test_the_samples_axis_has_one_row_a_sampled_request() -> None:
    found = Rule(sites="*", requests="all").select(STEP, "samples", 2)
    assert [(place.request, place.row, place.position) for place in found] == [("a", 1, 12), ("b", 0, 7)]


def test_nothing_is_wanted_when_nobody_opted_in() -> None:
    assert not Rule(sites="*").wants([Rows("b", start=0, count=1)])
    assert Rule(sites="*", requests="all").wants([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"take": "video"}, "take='video'"),
        ({"take": "attention"}, "stays inside the attention kernel"),
        ({"requests": "some"}, "requests='some'"),
        ({"rows": "first:0"}, "k > 0"),
        ({"rows": "few"}, "rows='few'"),
        ({"sites": "L[7-3].mlp_out"}, "range"),
        ({"sites": ""}, "sites=''"),
        ({"sites": 3}, "sites=3"),
        ({"requests": 0}, 'requests=0 is not known; it may be "opt-in", "all", or a share above 0 and up to 1'),
        ({"requests": 1.5}, "requests=1.5"),
        ({"requests": True}, "requests=True"),
        ({"requests": ["a"]}, "requests=['a']"),
        ({"rows": 3}, "rows=3"),
        ({"rows": "last:2"}, "rows='last:2'"),
        ({"phase": "mixed"}, 'phase=\'mixed\' is not known; it may be "prefill" or "decode"'),
        ({"phase": "warmup", "take": "summary"}, '"prefill", "decode" or "mixed"'),
        ({"cast": "int4"}, 'cast=\'int4\' is not known; it may be "bf16", "fp16" or "fp8"'),
        ({"cast": ["bf16"]}, "cast=['bf16']"),
        ({"topk": 0}, "topk=0"),
        ({"topk": 2.5}, "topk=2.5"),
        ({"max_bytes_per_s": "fast"}, "max_bytes_per_s='fast' is no rate; write it like \"64MiB\""),
        ({"max_bytes_per_s": 0}, "max_bytes_per_s=0"),
        ({"max_bytes_per_s": 10**400}, f"or 4096, of 1 to {2**62} bytes"),
        ({"max_bytes_per_s": "9" * 400}, f"or 4096, of 1 to {2**62} bytes"),
        ({"topk": 10**400}, f"it may be from 1 (the largest value of a row) to {2**62}"),
        ({"rows": f"every:{10**400}"}, f"k > 0 and up to {2**62}"),
        ({"rows": "first:" + "9" * 5000}, f"k > 0 and up to {2**62}"),
        ({"rows": "first:\u00b2"}, f"k > 0 and up to {2**62}"),
        ({"take": "summary", "every": 10**400}, f"it may be from 1 (each step) to {2**62}"),
        ({"take": "summary", "cast": "bf16"}, "all valid rows"),
        ({"take": "summary", "max_bytes_per_s": 5}, "all valid rows"),
        ({"take": "summary", "every": 2.5}, "every=2.5"),
        ({"take": "acme.total", "phase": "decode"}, "phase='decode' is for take="),
    ],
)
def test_a_rule_that_cannot_be_followed_says_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message)):
        Rule(**{"sites": "*", **fields})


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=8), st.sampled_from(["all", "last", "first:2"]))
def test_every_selected_row_belongs_to_the_request_that_owns_it(sizes: list[tuple[int, bool]], rows: str) -> None:
    step, start = [], 0
    for number, (count, capture) in enumerate(sizes):
        step.append(Rows(f"r{number}", start=start, count=count, position=100 * number, capture=capture))
        start += count
    owner = {row: entry for entry in step for row in range(entry.start, entry.start + entry.count)}
    for place in Rule(sites="*", rows=rows).select(step, "tokens", start):
        entry = owner[place.row]
        assert entry.capture
        assert place.request == entry.request
        assert place.position == entry.position + place.row - entry.start


MIXED = [
    Rows("a", start=0, count=3, position=10, phase="prefill", sample_row=0, capture=True),
    Rows("b", start=3, count=1, position=7, phase="decode", sample_row=1, capture=True),
    Rows("c", start=4, count=1, position=3, capture=True),
]


@pytest.mark.parametrize(
    ("phase", "of_step", "requests"),
    [("prefill", None, "aaa"), ("decode", None, "b"), ("decode", 1, "bc"), ("prefill", 0, "aaac"), (None, 2, "aaabc")],
)
def test_a_phase_means_requests_in_it_whatever_the_rest_of_the_step_does(
    phase: str | None, of_step: int | None, requests: str
) -> None:
    rule = Rule(sites="*", phase=phase)
    assert "".join(str(place.request) for place in rule.select(MIXED, "tokens", 5, of_step)) == requests
    assert rule.wants(MIXED, of_step)
    assert Rule(sites="*", phase=phase, requests="all").wants([], of_step) == (phase is None or of_step is not None)


@given(
    st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=40), st.floats(0.001, 1.0), st.floats(0.001, 1.0)
)
def test_a_share_of_requests_is_chosen_by_name_and_a_larger_one_holds_it(
    names: list[str], first: float, second: float
) -> None:
    step = [Rows(name, start=at, count=1) for at, name in enumerate(names)]
    small, large = sorted((first, second))
    chosen = [
        {place.request for place in Rule(sites="*", requests=share).select(step, "tokens", 0)}
        for share in (small, large)
    ]
    assert chosen[0] <= chosen[1]
    assert chosen[1] == {name for name in names if lot_of(name) < large}


def test_a_share_is_what_it_says_and_those_that_opt_in_are_beside_it() -> None:
    rule = Rule(sites="*", requests=0.1)
    step = [Rows(f"r{number}", start=number, count=1) for number in range(4000)]
    assert 0.08 < len(rule.select(step, "tokens", 0)) / 4000 < 0.12
    left = next(entry for entry in step if not rule.wants([entry]))
    assert rule.wants([Rows(left.request, start=0, count=1, capture=True)])


@given(st.integers(0, 40), st.integers(0, 12), st.sampled_from(["all", "last", "first:3", "every:4"]))
def test_rows_are_those_that_a_row_by_row_look_finds(position: int, count: int, rows: str) -> None:
    entry = Rows("a", start=5, count=count, position=position, capture=True)
    kept = {
        "all": [True] * count,
        "last": [at == count - 1 for at in range(count)],
        "first:3": [at < 3 for at in range(count)],
        "every:4": [(position + at) % 4 == 0 for at in range(count)],
    }
    expected = [(5 + at, position + at) for at in range(count) if kept[rows][at]]
    assert [(p.row, p.position) for p in Rule(sites="*", rows=rows).select([entry], "tokens", 0)] == expected


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12), st.integers(-1, 20)), max_size=5),
    st.sampled_from(["all", "last", "first:3", "every:4"]),
    st.sampled_from(["tokens", "samples"]),
    st.integers(1, 16),
)
def test_what_a_slab_holds_are_the_first_that_are_wanted_and_the_others_are_counted(
    numbers: list[tuple[int, int, int]], rows: str, axis: str, most: int
) -> None:
    rule = Rule(sites="*", rows=rows, requests="all")
    step = [Rows("a", start, count, sample_row=sample) for start, count, sample in numbers]
    every = rule.select(step, axis, 0) if step else []
    held = [place for place in every if place.row < most][:most]
    assert select_within(rule, step, axis, most) == (held, len(every) - len(held))


@pytest.mark.parametrize("rows", ["all", "every:2"])
def test_a_count_beyond_any_tensor_costs_no_more_than_what_a_slab_holds(rows: str) -> None:
    rule, step = Rule(sites="*", requests="all", rows=rows), [Rows("a", 0, 2**31 - 1), Rows("b", 0, 2**31 - 1)]
    tracemalloc.start()
    held, others = select_within(rule, step, "tokens", 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(held) + others == 2 * -(-(2**31 - 1) // (1 if rows == "all" else 2))
    assert peak < 1 << 20


def test_a_rule_that_counts_off_more_rows_than_a_slab_holds_is_refused() -> None:
    check_fit([Rule(sites="*", rows="first:16"), Rule(sites="*", rows="every:99")], 16)
    with pytest.raises(RuleError, match=r'write rows="first:16" or less, or raise max_rows'):
        check_fit([Rule(sites="*", rows="first:17")], 16)


@pytest.mark.parametrize(("bound", "rate"), [(None, None), (4096, 4096), ("64MiB", 64 << 20), ("1kB", 1000)])
def test_a_rate_is_a_number_of_bytes(bound: int | str | None, rate: int | None) -> None:
    assert Rule(sites="*", max_bytes_per_s=bound).rate == rate
