"""What a run of `look_ahead.py` showed: held against what the runner executed, and against transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from insitu_vllm_look import Asked
from numpy.typing import NDArray

TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest difference of a value, as a share of the largest magnitude in its row, between two implementations."""


@dataclass(frozen=True)
class Outcome:
    """What became of the taps of one run."""

    word: str
    """untapped; fires: each site of each stage in each forward, rows as transformers has them; silent: in none;
    differs: sites fired, with other rows than transformers has; foreign: forwards ran the graph of another plan; else
    what is wrong."""
    forwards: tuple[int, ...]
    """By rank, as the runner counts them."""
    difference: float | None = None
    """Of the rows, as `TOLERANCE`."""


class Reference:
    """Hidden states of transformers, by the tokens of a request."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._known: dict[tuple[int, ...], tuple[NDArray[np.float32], ...]] = {}

    def of(self, tokens: Sequence[int]) -> tuple[NDArray[np.float32], ...]:
        """Return the residual stream before each layer and at the end."""
        key = tuple(tokens)
        if key not in self._known:
            with torch.inference_mode():
                states = self._model(torch.tensor([key]), output_hidden_states=True).hidden_states
            self._known[key] = tuple(state[0].float().numpy() for state in states)
        return self._known[key]


def judge(asked: Asked, found: Mapping[str, Any], folder: Path, reference: Reference) -> Outcome:
    """found: what `look_ahead.serve` wrote; folder: where the ranks left their rows."""
    reports = found["reports"]
    forwards = tuple(report["executed"] for report in reports)
    if not asked.how:
        return Outcome("untapped", forwards)
    if asked.how == "hook":
        return Outcome(_of_hooks(asked, reports), forwards)
    for report in reports:
        if word := _of_stamps(asked, report):
            return Outcome(word, forwards)
    there = {site for report in reports for site in report["present"]}
    if there != set(range(len(asked.plan.sites))):
        return Outcome("sites that no stage has", forwards)
    differences = [_difference(asked, report, found["requests"], folder, reference) for report in reports]
    most = max(differences)
    word = "fires" if most <= TOLERANCE[asked.dtype] else "differs"
    return Outcome(word, forwards, most)


def _of_hooks(asked: Asked, reports: Sequence[Mapping[str, Any]]) -> str:
    fired = [num for report in reports for hooks in report["hooks"] for num in hooks.values()]
    due = sum(report["executed"] for report in reports) * len(asked.canaries) // len(reports)
    if not any(fired):
        return "silent"
    return "fires" if fired == [1] * due else f"hooks fired {sum(fired)} times, and {due} were due"


def _of_stamps(asked: Asked, report: Mapping[str, Any]) -> str:
    """Return what is wrong with what a rank's graph wrote, "" for nothing."""
    steps, present = report["steps"], report["present"]
    if len(steps) != report["executed"]:
        return f"{len(steps)} steps of {report['executed']} forwards"
    if not any(step["fired"] for step in steps):
        return "silent"
    if any(step["plan"] != report["plan"] for step in steps):
        return "foreign"
    rows = [site for site in present if site >= len(asked.canaries)]
    for step in steps:
        counts = {site: count for site, count in zip(_row_sites(asked), step["count"], strict=True) if site in rows}
        if step["fired"] != present or any(count != sum(step["num"]) for count in counts.values()):
            return f"a step fired {step['fired']} of {present} with rows {counts}"
        if step["taken"] != (asked.operator and _row_sites(asked)[0] in rows) or not step["is_finite"]:
            return f"a step came back to Python {step['taken']} times"
    return ""


def _row_sites(asked: Asked) -> list[int]:
    return [site.number for site in asked.plan.sites[len(asked.canaries) :]]


def _difference(
    asked: Asked, report: Mapping[str, Any], requests: Mapping[str, list[int]], folder: Path, reference: Reference
) -> float:
    """Return the largest difference of a rank's rows; infinity where a position is missing or there twice."""
    most = 0.0
    kept = np.load(folder / f"rank_{report['rank']}.npz")
    for site, layer in zip(_row_sites(asked), asked.rows, strict=True):
        if site not in report["present"]:
            continue
        rows, at, seen = kept[f"site_{site}"], 0, dict[str, list[int]]()
        for step in report["steps"]:
            for request, first, num in zip(step["requests"], step["first"], step["num"], strict=True):
                name = request.partition("-")[0]
                expected = reference.of(requests[name][:-1])[layer + 1][first : first + num]
                error = np.abs(rows[at : at + num] - expected).max(1) / np.abs(expected).max(1)
                most, at = max(most, float(error.max())), at + num
                seen.setdefault(name, []).extend(range(first, first + num))
        if any(seen[name] != list(range(len(tokens) - 1)) for name, tokens in requests.items()) or at != len(rows):
            return float("inf")
    return most
