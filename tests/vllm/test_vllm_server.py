"""`vllm serve`, two stages, compiled, with a collector and a judge beside it: headers, traces, a slow stage named."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_cases import NUM_LAYERS
from vllm_served import SPAN, TRACE, Served

from insitu.vocabulary import RequestEvent


def names(served: Served, answer: dict[str, Any]) -> set[str]:
    """Return vLLM's own names of a request, by that in its answer."""
    stored = set(served.store.table("requests")["request"].to_pylist())
    return {name for name in stored if name.startswith(answer["id"])}


def test_a_slow_stage_is_named_while_it_is_slow(served: Served) -> None:
    assert served.verdict.on_stage == 1
    assert served.verdict.text.startswith("stage 1 limits the pipeline")


def test_no_request_failed(served: Served) -> None:
    assert served.failed == []


def test_a_request_asks_for_its_rows_by_header_and_by_argument(served: Served) -> None:
    captured = set(served.store.captures(columns=["request"])["request"].to_pylist())
    asking = (served.asked, served.opted, served.last)
    assert captured == set().union(*(names(served, each) for each in asking))
    assert len(captured) == 3
    texts = {answer["choices"][0]["text"] for answer in (served.asked, served.opted, served.plain)}
    assert len(texts) == 1


def test_a_request_is_joined_with_the_span_of_vllm_by_its_trace(served: Served) -> None:
    rows = [row for row in served.store.table("requests").to_pylist() if row["trace_id"] == TRACE]
    assert {row["request"] for row in rows} == names(served, served.asked)
    assert {row["parent_span_id"] for row in rows} == {SPAN}
    spans = served.store.table("spans").to_pylist()
    assert any(_trace_of(span) == TRACE for span in spans), "vLLM's own span of that request is in the store"


def test_all_of_a_request_is_stored_after_which_the_server_is_told_to_end(served: Served) -> None:
    (name,) = names(served, served.last)
    rows = served.store.captures(columns=["request", "site"]).to_pylist()
    found = Counter(row["site"] for row in rows if row["request"] == name)
    num_positions = served.last["usage"]["total_tokens"] - 1
    assert found == {f"L{layer}.resid_post": num_positions for layer in range(NUM_LAYERS)}
    events = [row["event"] for row in served.store.table("requests").to_pylist() if row["request"] == name]
    assert RequestEvent.FINISHED in events
    steps = Counter(row["stage"] for row in served.store.table("steps").to_pylist())
    assert steps[0] == steps[1] > 0
    last_words = {row["rank"] for row in served.store.table("health").to_pylist() if row["closing"]}
    assert {-1, 0, 1} <= last_words
    assert "gaps" not in served.store.tables()


def _trace_of(span: dict[str, Any]) -> str:
    trace = span["trace_id"]
    return trace.hex() if isinstance(trace, bytes) else str(trace)


def test_ranks_and_driver_are_one_run(served: Served) -> None:
    sources = served.store.table("sources").to_pylist()
    mine = [row for row in sources if row["role"] in ("rank", "driver") and row["model"]]
    assert sorted((row["role"], row["rank"], row["stage"]) for row in mine) == [
        ("driver", -1, -1),
        ("rank", 0, 0),
        ("rank", 1, 1),
    ]
    assert len({row["run"] for row in mine}) == 1
