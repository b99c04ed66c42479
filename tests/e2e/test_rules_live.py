"""What a serving pipeline takes changes without a restart: both ranks follow, and the rows are what it computed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_system import MODEL, System, running
from transformers import AutoTokenizer

from insitu.row_forms import decoded
from insitu_collector.store import open_store

pytestmark = pytest.mark.timeout(300)

SERVE = ["-m", "insitu", "serve", "--stages", "2"]
PROMPT = "Once there was a brave farmer called Ada who lived near the river."
NUM_TOKENS = 12


def rules(system: System, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "insitu", "rules", *arguments, "--at", system.to]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def ranks_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    found: list[dict[str, Any]] = run["ranks"]
    return found


def complete(system: System) -> tuple[str, str]:
    answer = system.complete(PROMPT, max_tokens=NUM_TOKENS, temperature=0)
    return answer["id"], answer["choices"][0]["text"]


def test_rules_of_a_serving_pipeline_change_without_a_restart(tmp_path: Path) -> None:
    # The least budget there is: rows that nobody asked for by name would else be taken in fewer steps.
    with running(tmp_path, SERVE, {"INSITU_OVERHEAD_BUDGET": "1"}) as system:
        before, _ = complete(system)
        asked = ["--rule", "L*.resid_post,requests=all,rows=last,cast=bf16", "--rule", "logits,requests=all,topk=4"]
        assert [rank["next_version"] for rank in ranks_of(rules(system, "set", *asked, "--json"))] == [1, 1]
        during, text = complete(system)
        assert [rank["version"] for rank in ranks_of(rules(system, "show", "--json"))] == [1, 1]
        refused = rules(system, "set", "--rule", "L99.mlp_out")
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert ranks_of(rules(system, "for", "10m", "--none", "--json"))[0]["next_version"] == 2
        after, _ = complete(system)
        assert [(rank["version"], rank["rules"]) for rank in ranks_of(rules(system, "show", "--json"))] == [(2, [])] * 2
    store = open_store(system.store)
    names = {(row["rank"], row["site"]): row["name"] for row in store.table("sites").to_pylist()}
    rows = [row | {"name": names[row["rank"], row["site"]]} for row in store.table("captures").to_pylist()]
    assert {row["request"] for row in rows if row["request"] in (before, during, after)} == {during}
    mine = sorted((row for row in rows if row["request"] == during), key=lambda row: row["position"])
    hidden = {row["name"] for row in mine if row["dtype"] == "bfloat16"}
    assert hidden == {f"L{layer}.resid_post" for layer in range(8)}, "of both ranks"
    logits = [row for row in mine if row["name"] == "logits"]
    assert len(logits) == NUM_TOKENS
    places = [decoded(row["dtype"], row["data"])[1] for row in logits]
    ids = [int(each[0]) for each in places if each is not None]
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text, "the largest logit of each step is what it said"
    told = [row for row in store.table("events").to_pylist() if row["kind"] in ("rules_set", "rules_in_force")]
    assert sorted((row["kind"], row["rank"]) for row in told) == sorted(
        [("rules_set", -1)] * 2 + [("rules_in_force", rank) for rank in (0, 0, 1, 1)]
    )
