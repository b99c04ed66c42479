"""Engines side by side (DP), and experts over ranks (EP): each tells its own place, and its own requests.

Experts over ranks only begin: on a host vLLM itself ends at their first step (docs/integrations.md).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from random_checkpoints import NUM_LAYERS, make
from vllm_cases import Engine, run_vllm
from vllm_served import Engines, run_data_parallel, run_experts_of_engines
from vllm_table import differs, seen

from insitu.vocabulary import RequestEvent, VerdictKind
from insitu_collector.rows.slices import Groups
from insitu_collector.views.stalls_words import to_json, to_text

pytestmark = pytest.mark.soak
"""Three starts of vLLM: `make test-vllm ARGS="-m soak"`."""


@pytest.fixture(scope="module")
def engines(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return run_data_parallel(vllm_python, tmp_path_factory.mktemp("engines"))


def rows_of(engines: Engines, table: str) -> list[dict[str, Any]]:
    """Return the rows of a table, each with the engine of who wrote it."""
    engine_of = {row["epoch"]: row["replica"] for row in engines.store.table("sources").to_pylist()}
    return [{**row, "engine": engine_of[row["epoch"]]} for row in engines.store.table(table).to_pylist()]


def test_engines_are_told_apart(engines: Engines) -> None:
    sources = engines.store.table("sources").to_pylist()
    assert sorted((row["role"], row["replica"], row["dp_rank"], row["rank"], row["stage"]) for row in sources) == [
        ("driver", 0, 0, -1, -1),
        ("driver", 1, 1, -1, -1),
        ("rank", 0, 0, 0, 0),
        ("rank", 1, 1, 0, 0),
    ]
    assert len({row["epoch"] for row in sources}) == len({row["pid"] for row in sources}) == 4
    assert len({row["run"] for row in sources}) == 1


@pytest.mark.parametrize("engine", [0, 1])
def test_a_request_is_of_the_engine_that_was_asked(engines: Engines, engine: int) -> None:
    asked = {answer["id"]: answer for answer in engines.answered[engine]}
    ended = [row for row in rows_of(engines, "requests") if row["event"] == RequestEvent.FINISHED]
    mine = {row["request"] for row in ended if row["engine"] == engine}
    assert sorted(name.rsplit("-", 2)[0] for name in mine) == sorted(asked)
    steps = [row for row in rows_of(engines, "steps") if row["engine"] == engine]
    assert {entry["request"] for step in steps for entry in step["rows"]} == mine
    assert [step["step_id"] for step in steps] == list(range(len(steps)))
    captured = engines.store.captures(columns=["request", "site", "replica"]).to_pylist()
    found = Counter((row["request"], row["site"]) for row in captured if row["replica"] == engine)
    for name in mine:
        num_positions = asked[name.rsplit("-", 2)[0]]["usage"]["total_tokens"] - 1
        assert {found[name, f"L{layer}.resid_post"] for layer in range(NUM_LAYERS)} == {num_positions}
    assert {name for name, _ in found} == mine


@pytest.mark.parametrize("engine", [0, 1])
def test_each_engine_is_judged_with_its_own_scheduler_and_requests_alone(engines: Engines, engine: int) -> None:
    found = engines.store.stalls(replica=engine)
    assert (found.replica, found.replicas) == (engine, (0, 1))
    assert found.ledger is not None and found.ledger.ranks == [0]
    assert found.requests is not None and found.requests.num_requests == len(engines.answered[engine])
    assert found.requests.num_unborn == found.requests.num_open == 0
    assert not found.missing
    assert VerdictKind.STUCK not in {verdict.kind for verdict in found.verdicts}


def test_rows_of_a_scheduler_go_to_its_engine_alone(engines: Engines) -> None:
    store = engines.store
    found = Groups().sort({name: store.table(name) for name in ("sources", "requests", "events")})
    of_engine = {row["epoch"]: row["replica"] for row in store.table("sources").to_pylist()}
    assert [replica for _, replica in found] == [0, 1]
    for (_, replica), tables in found.items():
        for name, rows in tables.items():
            assert {of_engine[epoch] for epoch in rows["epoch"].to_pylist()} == {replica}, name
    assert sum(tables["requests"].num_rows for tables in found.values()) == store.table("requests").num_rows


def test_both_engines_are_told_of_side_by_side(engines: Engines) -> None:
    found = engines.store.stalls()
    assert [each.replica for each in found.shown] == [0, 1]
    text = to_text(found)
    assert text.index("\nReplica 0\n") < text.index("\nReplica 1\n")
    told = [part["requests"]["num_requests"] for part in to_json(found)["replicas"]]
    assert told == [len(engines.answered[engine]) for engine in (0, 1)]


def test_the_page_shows_what_these_engines_showed(engines: Engines) -> None:
    row = ["two engines (DP), eager, of a model without experts", *seen(engines.store)]
    assert not (wanted := differs("what longer tests saw", [row])), wanted


def test_ranks_that_share_experts_say_which(vllm_python: str, tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enforce_eager": True}
    model = {"model": str(make("Qwen2Moe", tmp_path / "model")), "skip_tokenizer_init": True}
    (run,) = run_vllm(vllm_python, tmp_path, Engine("experts", [], {**options, **model}))
    ranks = [row for row in run.rows("sources") if row["role"] == "rank"]
    assert sorted((row["rank"], row["tp_rank"], row["ep_rank"], row["dp_rank"]) for row in ranks) == [
        (0, 0, 0, 0),
        (1, 1, 1, 0),
    ]


def test_engines_that_share_experts_say_which(vllm_python: str, tmp_path: Path) -> None:
    sources = run_experts_of_engines(vllm_python, tmp_path).table("sources").to_pylist()
    ranks = [row for row in sources if row["role"] == "rank"]
    assert sorted((row["replica"], row["dp_rank"], row["rank"], row["ep_rank"]) for row in ranks) == [
        (0, 0, 0, 0),
        (1, 1, 0, 1),
    ]
