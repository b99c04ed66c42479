"""A value that is not finite is found in the step in which it arose, at its rank, its layer and its request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording

NUM_RANKS, NUM_LAYERS = 2, 3
ROWS = [insitu.Rows("a", 0, 2), insitu.Rows("b", 2, 3), insitu.Rows("c", 5, 1)]
POISONED, REQUEST = 4, "b"


class Fragile(nn.Module):
    """Breaks the rows whose last value is its number: what is in a graph as it is without one."""

    def __init__(self, number: int, value: float) -> None:
        super().__init__()
        self._number, self._value = number, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, -1:] == self._number, self._value, x)


class Layer(nn.Module):
    def __init__(self, number: int, value: float) -> None:
        super().__init__()
        self.self_attn = nn.Identity()
        self.mlp = Fragile(number, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(self.self_attn(x))
        return output


class Stage(nn.Module):
    def __init__(self, rank: int, value: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(rank * NUM_LAYERS + layer, value) for layer in range(NUM_LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def bad_sites(recording: Recording, step: int) -> list[str]:
    """Return the sites that were told of a step and are not finite, in order of execution."""
    names = {row["site"]: row["name"] for row in recording.rows("sites")}
    rows = sorted(recording.rows("summaries", step_id=step), key=lambda row: row["site"])
    return [names[row["site"]] for row in rows if not np.isfinite(row["canary"])]


@pytest.mark.parametrize(("mode", "value"), [(None, float("nan")), (None, float("-inf")), ("eager", float("nan"))])
def test_a_bad_value_at_any_layer_of_any_rank_is_found_in_its_step(mode: str | None, value: float) -> None:
    recordings = [Recording() for _ in range(NUM_RANKS)]
    stages = [Stage(rank, value).eval() for rank in range(NUM_RANKS)]
    sessions = [insitu.attach(stages[n], to=recordings[n], rank=n, stage=n) for n in range(NUM_RANKS)]
    called: list[Any] = [s if mode is None else torch.compile(s, backend=mode, fullgraph=True) for s in stages]
    places = {3 * at + 2: (at // NUM_LAYERS, at % NUM_LAYERS) for at in range(NUM_RANKS * NUM_LAYERS)}
    with torch.inference_mode():
        for step in range(3 * len(places) + 1):
            x = torch.full((6, 4), -1.0)
            if step in places:
                x[POISONED, -1] = float(places[step][0] * NUM_LAYERS + places[step][1])
            for session, stage in zip(sessions, called, strict=True):
                with session.step(step, rows=ROWS):
                    x = stage(x)
    for session in sessions:
        session.close()
    inside = ("attn_out", "mlp_out", "resid_post")
    everything = [f"L{layer}.{name}" for layer in range(NUM_LAYERS) for name in inside]
    for step in range(3 * len(places) + 1):
        rank, layer = places.get(step, (NUM_RANKS, 0))
        for other, recording in enumerate(recordings):
            expected = everything[everything.index(f"L{layer}.mlp_out") :] if other == rank else everything
            assert bad_sites(recording, step) == (expected if other >= rank else []), (step, other)
            (boundary,) = [row for row in recording.rows("summaries", step_id=step) if row["absmax"] is not None]
            assert boundary["nonfinite_rows"] == ([POISONED] if other >= rank else [])
    for row in recordings[0].rows("steps"):
        owners = [each["request"] for each in row["rows"] if each["row"] <= POISONED < each["row"] + each["count"]]
        assert owners == [REQUEST]
