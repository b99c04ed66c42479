"""A two-rank engine takes the rows of whom the head samples, on every rank, and of nobody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from live_system import MODEL, System, running

from insitu_collector.store import open_store

pytestmark = pytest.mark.timeout(120)

TRACE = "0af7651916cd43dd8448eb211c80319c"
NUM_TOKENS = 4


def ask(system: System, headers: dict[str, str]) -> str:
    """Return the name of a request that came with these headers."""
    body: dict[str, Any] = {
        "model": MODEL.name,
        "prompt": "The old tree",
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=60)
    answer.raise_for_status()
    name: str = answer.json()["id"]
    return name


def parent(flags: str) -> dict[str, str]:
    return {"traceparent": f"00-{TRACE}-b7ad6b7169203331-{flags}"}


def test_rows_are_taken_of_the_sampled_on_both_ranks_and_of_no_other(tmp_path: Path) -> None:
    serve = ["-m", "insitu", "serve", "--stages", "2", "--sample", "1e-12"]
    with running(tmp_path, serve) as system:
        taken = [
            ask(system, {"insitu": "capture=rows"}),
            ask(system, {"baggage": "insitu=capture%3Drows"}),
            ask(system, {"insitu": "capture=rows", **parent("00")}),
            ask(system, parent("01")),
        ]
        left = [ask(system, {}), ask(system, parent("00")), ask(system, {"insitu": "capture=none"})]
    rows = open_store(system.store).table("captures").to_pylist()
    positions: dict[tuple[int, str], set[int]] = {}
    for row in rows:
        positions.setdefault((row["rank"], row["request"]), set()).add(row["position"])
    assert set(positions) == {(rank, name) for rank in (0, 1) for name in taken}
    assert not any(name in {row["request"] for row in rows} for name in left)
    (every,) = {frozenset(found) for found in positions.values()}
    assert every == frozenset(range(max(every) + 1)), "of the prompt and of every step after it"
    assert len(every) > NUM_TOKENS


def test_without_a_share_only_who_asks_is_taken(tmp_path: Path) -> None:
    with running(tmp_path, ["-m", "insitu", "serve", "--stages", "2"]) as system:
        ask(system, parent("01"))
        asked = ask(system, {"insitu": "capture=rows"})
    rows = open_store(system.store).table("captures").to_pylist()
    assert {(row["rank"], row["request"]) for row in rows} == {(0, asked), (1, asked)}
