"""What a run of vLLM showed, as a row of a table in docs/integrations.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vllm_cases import ROOT

from insitu.vocabulary import IntervalClass
from insitu_collector.store import Store

HEAD: Final = (
    "vLLM 0.32 on a host",
    "where a rank's time goes",
    "steps, whose rows",
    "sums at a stage's end",
    "rows of requests",
    "what it says",
)
BY_CHANCE: Final = frozenset({"gc", "send_xfer"})
"""Classes of intervals that a run may or may not have."""


def seen(store: Store, said: Sequence[str] = ()) -> list[str]:
    """Return what a run showed, as cells."""
    tables = {name: store.table(name).to_pylist() for name in store.tables()}
    intervals = [row for row in tables["intervals"] if row["rank"] >= 0]
    classes = {IntervalClass(row["cls"]).name.lower() for row in intervals} - BY_CHANCE
    steps = tables.get("steps", [])
    first = [step for step in steps if step["stage"] == 0]
    rows = "with whose rows" if first and all(step["rows"] for step in first) else "without whose rows"
    in_stage = {(row["stage"], row["step_id"]) for row in tables.get("summaries", [])}
    is_summed = bool(steps) and in_stage >= {(row["stage"], row["step_id"]) for row in steps}
    told = [row["text"] for row in tables.get("events", []) if row["kind"] == "not_observed"]
    return [
        ", ".join(sorted(classes)),
        rows if steps else "no",
        "in every step" if is_summed else "no",
        "of those that ask" if tables.get("captures") else "no",
        "; ".join(dict.fromkeys([*told, *said])),
    ]


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def differs(name: str, rows: Sequence[Sequence[str]]) -> str:
    """Return what the page should have between the marks of this name; empty where it does."""
    table = "".join([line(HEAD), line(["---"] * len(HEAD)), *map(line, rows)])
    page = (ROOT / "docs" / "integrations.md").read_text()
    shown = page.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    return "" if shown == table else f"docs/integrations.md should have between its marks:\n{table}"
