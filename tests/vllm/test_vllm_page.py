"""The table in docs/integrations.md says what these runs showed, to the letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm_cases import ROOT, Run, Shared, refused_runner
from vllm_served import Served

from insitu.vocabulary import IntervalClass
from insitu_collector.store import Store

BEGIN, END = "<!-- what tests/vllm saw -->\n", "<!-- end -->"
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


def test_the_page_shows_what_these_runs_showed(
    vllm_python: str, eager: Run, compiled: Run, shards: Shared, served: Served, refused: Mapping[str, Run]
) -> None:
    def of(run: Run) -> list[str]:
        return seen(run.store)

    nothing: list[Any] = ["no", "no", "no", "no"]
    rows = [
        ["one rank, eager", *of(eager)],
        ["two ranks of a stage (TP), eager", *of(shards.run)],
        ["one rank, compiled", *of(refused["graph"])],
        ["two stages (PP), compiled, `INSITU_VLLM_ROWS=L*.resid_post,logits`", *of(compiled)],
        ["its server, two stages, compiled, `INSITU_VLLM_ROWS=L*.resid_post`", *seen(served.store)],
        ["speculative decoding", *of(refused["speculative"])],
        ["a model whose sites nobody verified (OPT), eager", *of(refused["unknown-model"])],
        ["another plug-in on the runner", *of(refused["other-plugin"])],
        ["a runner of the second generation", *nothing, refused_runner(vllm_python)],
        ["another version", *nothing, refused["unknown-version"].said()[0]],
    ]
    table = "".join([line(HEAD), line(["---"] * len(HEAD)), *map(line, rows)])
    page = (ROOT / "docs" / "integrations.md").read_text()
    shown = page.partition(BEGIN)[2].partition(END)[0]
    assert shown == table, f"docs/integrations.md should have between its marks:\n{table}"
