"""`docs/integrations.md` has tables of what is observed in which mode as running the modes says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest
from torch_modes import TORCH_MODES
from torch_modes import outcome as torch_outcome
from transformers_modes import MODES
from transformers_modes import outcome as transformers_outcome

PAGE: Final = Path(__file__).parents[2] / "docs/integrations.md"


def transformers_table() -> list[str]:
    """Return a line a mode of transformers."""
    lines = ["| how it runs | steps | sites | rows are somebody's | to know |", "|---|---|---|---|---|"]
    for mode in MODES:
        run, num_checked = transformers_outcome(mode)
        steps = "each forward" if len(run.steps) >= run.num_forwards else f"{len(run.steps)} of {run.num_forwards}"
        reason = next((line.partition(": ")[2].partition(";")[0] for line in run.said), "")
        reason = reason.partition(": ")[2]
        rows = "yes" if num_checked else f"no: {reason}"
        lines.append(f"| {mode.title} | {steps} | {_fired(run.fired, run.num_sites)} | {rows} | {mode.note} |")
    return lines


def torch_table() -> list[str]:
    """Return a line a way to run a module of torch."""
    lines = ["| what is attached | steps | sites | outputs | to know |", "|---|---|---|---|---|"]
    for mode in TORCH_MODES:
        found = torch_outcome(mode)
        if found.refused:
            lines.append(f"| {mode.title} | refused | - | as they were | `{found.refused}` |")
            continue
        steps = (
            "each forward" if found.num_steps == found.num_forwards else f"{found.num_steps} of {found.num_forwards}"
        )
        same = "the same bits" if found.is_same else "others"
        lines.append(f"| {mode.title} | {steps} | {_fired(found.fired, found.num_sites)} | {same} | {mode.note} |")
    return lines


def _fired(fired: int, num_sites: int) -> str:
    return "all" if fired == num_sites else f"{fired} of {num_sites}"


TABLES: Final[dict[str, Callable[[], Sequence[str]]]] = {"transformers": transformers_table, "torch": torch_table}


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- table: {name}, written by tests/probe/test_integrations_modes.py -->\n", "\n<!-- end of the table -->"


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, of what it unflattens
@pytest.mark.parametrize("name", TABLES)
def test_the_page_says_what_running_the_modes_says(name: str) -> None:
    begin, end = _marks(name)
    found = PAGE.read_text().partition(begin)[2].partition(end)[0]
    assert found == "\n".join(TABLES[name]()), "docs/integrations.md is stale: run this file with Python"


if __name__ == "__main__":
    page = PAGE.read_text()
    for name, table in TABLES.items():
        begin, end = _marks(name)
        text = begin + "\n".join(table()) + end
        before, _, rest = page.partition(begin)
        page = before + text + rest.partition(end)[2]
    PAGE.write_text(page)
