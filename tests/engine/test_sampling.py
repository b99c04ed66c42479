"""From logits to ids: greedy, drawn, cut, repeatable, and not fooled by NaN."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu_engine.messages import NOT_FINITE, RowPlan, Sampling
from insitu_engine.sampling import sample


def row(how: Sampling, position: int = 0, sample_row: int = 0) -> RowPlan:
    return RowPlan("r", sample_row, 1, position, "decode", sample_row, False, [1], [0], how)


def drawn(logits: list[float], how: Sampling, num: int = 2000) -> Counter[int]:
    rows = [row(how, position) for position in range(num)]
    return Counter(sample(torch.tensor([logits]).expand(num, -1), rows))


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
def test_greedy_takes_the_most_likely(logits: list[list[float]]) -> None:
    tensor = torch.tensor(logits)
    ids = sample(tensor, [row(Sampling(), 0, at) for at in range(len(logits))])
    assert ids == tensor.argmax(-1).tolist()


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, 5), []) == []


def test_rows_that_are_not_finite_are_told_and_the_others_go_on() -> None:
    logits = torch.zeros(4, 9)
    logits[0, 3] = logits[3, 5] = 1
    logits[1, 2] = float("inf")
    logits[2, 8] = float("nan")
    rows = [row(Sampling(temperature), 0, at) for at, temperature in enumerate((0.0, 1.0, 0.0, 0.0))]
    assert sample(logits, rows) == [3, NOT_FINITE, NOT_FINITE, 5]


def test_large_finite_logits_are_finite() -> None:
    assert sample(torch.full((1, 3), 3e38), [row(Sampling())]) == [0]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().tolist()
    counts = drawn(logits, Sampling(1.0, seed=11))
    for token, share in enumerate((0.5, 0.3, 0.2)):
        assert counts[token] / 2000 == pytest.approx(share, abs=0.04)


def test_temperature_sharpens_and_flattens() -> None:
    logits = [2.0, 1.0, 0.0]
    cold, hot = (drawn(logits, Sampling(t, seed=1))[0] for t in (0.25, 4.0))
    assert cold > 1900
    assert 650 < hot < 1050


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().tolist()
    assert set(drawn(logits, Sampling(1.0, top_k=2))) == {1, 2}
    assert set(drawn(logits, Sampling(1.0, top_p=0.6))) == {1, 2}
    assert set(drawn(logits, Sampling(1.0, top_p=0.3))) == {1}
    assert set(drawn(logits, Sampling(1.0, top_k=1, top_p=0.9))) == {1}


@given(seed=st.integers(0, 2**62), position=st.integers(0, 10_000), others=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_a_token_depends_on_its_own_row_alone(seed: int, position: int, others: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(others + 1, 40)
    how = Sampling(0.8, 20, 0.9, seed)
    beside = [row(Sampling(1.0, seed=at), at, at) for at in range(others)]
    alone = sample(logits[-1:], [row(how, position)])
    assert sample(logits, [*beside, row(how, position, others)])[-1] == alone[0]


def test_seeds_and_positions_differ() -> None:
    logits = torch.zeros(1, 1000)
    one = [sample(logits, [row(Sampling(1.0, seed=1), at)])[0] for at in range(20)]
    other = [sample(logits, [row(Sampling(1.0, seed=2), at)])[0] for at in range(20)]
    assert one != other
    assert len(set(one)) > 10
