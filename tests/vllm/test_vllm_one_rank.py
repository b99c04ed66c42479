"""One rank of vLLM, eager: where its time goes, whose rows it ran, and rows that are those of transformers."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from vllm_cases import CACHED, NUM_LAYERS, TOLERANCE, Reference, Run, compare

from insitu.vocabulary import IntervalClass, RequestEvent


def test_ten_thousand_rows_are_those_of_transformers(eager: Run, reference: Reference) -> None:
    sites = [f"L{layer}.resid_post" for layer in range(NUM_LAYERS)]
    compared = compare(eager, reference, [*sites, "logits"])
    assert compared.num_rows >= 10_000
    assert compared.difference <= TOLERANCE


def test_row_maps_have_each_position_of_each_request_once(eager: Run) -> None:
    seen: dict[str, list[int]] = {}
    for step in sorted(eager.rows("steps"), key=lambda step: step["step_id"]):
        at = 0
        for entry in step["rows"]:
            assert entry["row"] == at
            at += entry["count"]
            seen.setdefault(entry["request"], []).extend(range(entry["position"], entry["position"] + entry["count"]))
        assert at == step["num_rows"]
    from_cache = {name for name, positions in seen.items() if positions[0] == CACHED}
    assert len(from_cache) == 1
    for name, request in eager.names.items():
        num = len(request["prompt"]) + len(request["output"]) - 1
        assert seen[name] == list(range(CACHED if name in from_cache else 0, num))


def test_rows_that_came_from_the_prefix_cache_are_reported_as_such(eager: Run) -> None:
    (event,) = [row for row in eager.rows("events") if row["kind"] == "prefix_cached"]
    assert event["text"].endswith(f": positions 0 to {CACHED - 1} came from the prefix cache")
    steps = {step["step_id"]: step for step in eager.rows("steps")}
    name = event["text"].partition(":")[0]
    assert [entry["position"] for entry in steps[event["step_id"]]["rows"] if entry["request"] == name] == [CACHED]


def test_steps_are_counted_without_a_gap(eager: Run) -> None:
    assert [step["step_id"] for step in eager.rows("steps")] == list(range(len(eager.rows("steps"))))


def test_the_rank_accounts_for_all_of_its_time(eager: Run) -> None:
    rows = eager.time_of(0)
    assert all(before["t1_ns"] <= after["t0_ns"] for before, after in pairwise(rows))
    covered = sum(row["t1_ns"] - row["t0_ns"] for row in rows)
    assert covered >= 0.999 * (rows[-1]["t1_ns"] - rows[0]["t0_ns"])
    counts = Counter(IntervalClass(row["cls"]) for row in rows)
    num_steps = len(eager.rows("steps"))
    assert counts[IntervalClass.SAMPLE] == num_steps
    assert counts[IntervalClass.COMPUTE] >= 2 * num_steps, "a forward and the logits, each step"
    assert {IntervalClass.IDLE, IntervalClass.RECV_WAIT, IntervalClass.HOST, IntervalClass.COMPILE} <= set(counts)


def test_decisions_of_the_scheduler_are_timed(eager: Run) -> None:
    rows = [row for row in eager.rows("intervals") if row["rank"] == -1]
    assert sum(row["cls"] == IntervalClass.SCHEDULE for row in rows) >= len(eager.rows("steps"))


def test_requests_live_from_arrival_to_their_last_token(eager: Run) -> None:
    lives: dict[str, list[RequestEvent]] = {}
    for row in sorted(eager.rows("requests"), key=lambda row: row["row_seq"]):
        lives.setdefault(row["request"], []).append(RequestEvent(row["event"]))
    begin = [RequestEvent.ARRIVED, RequestEvent.QUEUED, RequestEvent.SCHEDULED, RequestEvent.FIRST_TOKEN]
    for name, request in eager.names.items():
        tokens = [RequestEvent.TOKEN] * (len(request["output"]) - 1)
        assert lives[name] == [*begin, *tokens, RequestEvent.FINISHED]


def test_who_wrote_is_told(eager: Run) -> None:
    rank, driver = sorted(eager.rows("sources"), key=lambda row: -row["rank"])
    assert (rank["role"], rank["rank"], rank["stage"], rank["tp_rank"], rank["dp_rank"]) == ("rank", 0, 0, 0, 0)
    assert driver["role"] == "driver"
    assert rank["run"] == driver["run"]
    assert rank["param_bytes"] > 0 and rank["plan_digest"]


def test_the_sites_of_the_model_are_known_and_its_boundaries_seen_in_every_step(eager: Run) -> None:
    sites = {(row["epoch"], row["site"]): row["name"] for row in eager.rows("sites")}
    expected = {f"L{layer}.{part}" for layer in range(NUM_LAYERS) for part in ("attn_out", "mlp_out", "resid_post")}
    assert set(sites.values()) == {"embed", "final_norm", "logits", *expected}
    seen = Counter(sites[row["epoch"], row["site"]] for row in eager.rows("summaries"))
    num_steps = len(eager.rows("steps"))
    assert seen == {f"L{NUM_LAYERS - 1}.resid_post": num_steps, "logits": num_steps}


def test_health_is_reported_nothing_was_lost_and_no_site_was_silent(eager: Run) -> None:
    assert {row["rank"] for row in eager.rows("health")} == {-1, 0}
    assert "gaps" not in eager.store.tables()
    assert eager.said() == []
