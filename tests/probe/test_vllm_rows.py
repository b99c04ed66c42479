"""Row maps of vLLM's steps, from what its runner had prepared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu import RequestContext, Rows
from insitu.vllm.asked import Asked
from insitu.vllm.rows import row_map


def test_chunks_of_prompts_and_single_tokens_stand_side_by_side() -> None:
    found = row_map(["a", "b", "c"], [0, 1, 6, 18], [7, 0, 128], [4, 5, 200], {})
    assert found == [
        Rows("a", start=0, count=1, position=7, phase="decode", sample_row=0),
        Rows("b", start=1, count=5, position=0, phase="prefill", sample_row=1),
        Rows("c", start=6, count=12, position=128, phase="prefill", sample_row=2),
    ]


def test_the_last_token_of_a_prompt_is_prefill_and_the_next_is_decode() -> None:
    last, after = (row_map(["a"], [0, 1], [position], [5], {})[0] for position in (4, 5))
    assert (last.phase, after.phase) == ("prefill", "decode")


def test_a_request_that_was_preempted_computes_its_answers_again_as_prefill() -> None:
    (row,) = row_map(["a"], [0, 9], [0], [5], {})
    assert (row.phase, row.count) == ("prefill", 9)


def test_what_a_request_asked_stands_on_its_rows_alone() -> None:
    trace = RequestContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", True)
    first, second = row_map(["a", "b"], [0, 1, 2], [3, 3], [3, 3], {"b": Asked(True, trace)})
    assert (first.capture, first.trace) == (False, None)
    assert (second.capture, second.trace) == (True, trace)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300), st.integers(1, 300)), max_size=12))
def test_each_row_belongs_to_one_request(requests: list[tuple[int, int, int]]) -> None:
    starts = [0]
    for count, _, _ in requests:
        starts.append(starts[-1] + count)
    names = [str(at) for at in range(len(requests))]
    found = row_map(names, starts, [each[1] for each in requests], [each[2] for each in requests], {})
    owners = [entry.request for entry in found for _ in range(entry.count)]
    assert owners == [name for name, (count, _, _) in zip(names, requests, strict=True) for _ in range(count)]
    assert [entry.start for entry in found] == starts[:-1]
    assert [entry.sample_row for entry in found] == list(range(len(requests)))
