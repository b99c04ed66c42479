"""Rules pick sites by glob and rows by request, axis and position."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.rows import Rows
from insitu.rules import Rule, RuleError, matches

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
        ({"requests": "some"}, "requests='some'"),
        ({"rows": "first:0"}, "k > 0"),
        ({"rows": "few"}, "rows='few'"),
        ({"sites": "L[7-3].mlp_out"}, "range"),
    ],
)
def test_a_rule_that_cannot_be_followed_says_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message.replace("(", r"\(").replace("[", r"\[")):
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
