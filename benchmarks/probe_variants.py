"""Ways to run one model: bare, and with the rows of all layers on disk, as somebody without a probe would keep them.

Each runs steps over the same inputs, says when everything that they left is durable, and is checked by what is read
from the disk again. Nothing here needs insitu: peers run in an environment that has it not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from llamas import build, states_of, twin
from numpy.typing import NDArray
from row_files import Format, RowFiles

NUM_INPUTS: Final = 32
"""Different inputs; steps take them in turns."""
NUM_COMPARED: Final = 4
"""Steps whose rows are compared with a reference, value by value."""
CLOSE: Final = 2e-4
"""Largest difference, against the largest value, of rows that another order of additions has made."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is run: a model, `batch` sequences of `tokens` each in a step, eager or compiled."""

    model: str
    batch: int
    tokens: int
    compiled: bool
    folder: Path
    """On the disk that is written; of this process alone."""
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """Token rows of a step."""
        return self.batch * self.tokens


@dataclass(frozen=True, slots=True)
class Check:
    """What was read from the disk again."""

    expected: int
    """Rows: steps x layers x tokens, or what else the variant leaves."""
    found: int
    num_compared: int = 0
    """Rows compared with the reference."""
    same_bits: bool = True
    off: float = 0.0
    """Largest difference from the reference, against its largest value."""

    def holds(self, *, bits: bool) -> bool:
        """Tell whether all is there and right. bits: to the last one."""
        return self.found == self.expected and (self.same_bits or (not bits and self.off <= CLOSE))


class Bench:
    """What the variants of one process share."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = build(job.model, job.seed)
        torch.manual_seed(job.seed + 1)
        shape = (NUM_INPUTS, job.batch, job.tokens)
        self.inputs = tuple(torch.randint(0, self.model.config.vocab_size, shape))
        self.num_layers = int(self.model.config.num_hidden_layers)

    def input_of(self, step: int) -> torch.Tensor:
        ids: torch.Tensor = self.inputs[step % NUM_INPUTS]
        return ids

    def compare(self, kept: Mapping[int, Sequence[NDArray[np.float32]]], num_steps: int) -> Check:
        """Hold rows [tokens, width] by step and layer against what plain hooks see. num_steps: that were to be kept."""
        found = sum(len(rows) for states in kept.values() for rows in states)
        steps = sorted(step for step, states in kept.items() if len(states) == self.num_layers)
        sample = steps[:: max(1, len(steps) // NUM_COMPARED)][:NUM_COMPARED]
        num_compared, same, off = 0, bool(sample), 0.0
        for step in sample:
            reference = np.stack(states_of(self.model, self.input_of(step)))
            rows = np.stack(kept[step])
            num_compared += rows.shape[0] * rows.shape[1]
            same = same and rows.tobytes() == reference.tobytes()
            off = max(off, float(np.abs(rows - reference).max() / np.abs(reference).max()))
        expected = num_steps * self.num_layers * self.job.num_rows
        return Check(expected, found, num_compared, same, off)


class Bare:
    """A model as it is; the others add to it."""

    needs_bits = True
    """Whether what it keeps is to be the reference to the last bit, in eager."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.model = self.prepared(twin(bench.model))
        self.run = self.compiled(self.model) if bench.job.compiled else self.model
        self.num_steps = 0

    def prepared(self, model: Any) -> Any:
        """Return what is run, before it is compiled."""
        return model

    def compiled(self, model: Any) -> Any:
        return torch.compile(model, fullgraph=True)

    def step(self) -> None:
        """Run one step."""
        ids = self.bench.input_of(self.num_steps)
        self.forward(ids)
        self.num_steps += 1

    def forward(self, ids: torch.Tensor) -> None:
        self.run(input_ids=ids, use_cache=False)

    def settle(self) -> None:
        """Return once everything that the steps left is durable."""

    def check(self) -> Check | None:
        """Return what is on the disk after all steps; None where there is to be nothing."""
        return None

    @property
    def num_sites(self) -> int:
        """Sites that are tapped."""
        return 0

    def sampled(self) -> dict[str, int] | None:
        """Return in how many of how many steps statistics were taken, and of how many sites there was no room for."""
        return None

    def close(self) -> None:
        """Let go."""


class ByHand(Bare):
    """What every layer hands on, of every token, in files."""

    def __init__(self, bench: Bench, name: str, format_: Format, *, on_thread: bool) -> None:
        self.files = RowFiles(bench.job.folder / name, format_, on_thread=on_thread)
        self.now: Sequence[torch.Tensor] = []
        super().__init__(bench)

    def compiled(self, model: Any) -> Any:
        return torch.compile(model)

    def step(self) -> None:
        number = self.num_steps
        super().step()
        self.files.put(number, self.now)

    def settle(self) -> None:
        self.files.settle()

    def check(self) -> Check | None:
        return self.bench.compare(self.files.read(), self.num_steps)


class Hooked(ByHand):
    """By a plain forward hook on each layer, which clones: what a layer returned may be written over."""

    def prepared(self, model: Any) -> Any:
        for layer in model.model.layers:
            layer.register_forward_hook(self._keep)
        return model

    def _keep(self, module: Any, given: Any, output: Any) -> None:
        x = output if isinstance(output, torch.Tensor) else output[0]
        self._states.append(x.detach().clone())

    def forward(self, ids: torch.Tensor) -> None:
        self._states: list[torch.Tensor] = []
        super().forward(ids)
        self.now = self._states


class HiddenStates(ByHand):
    """By `output_hidden_states`; the last is what the last layer hands on, and not its norm."""

    def prepared(self, model: Any) -> Any:
        model.config.tie_last_hidden_states = False
        return model

    def forward(self, ids: torch.Tensor) -> None:
        output = self.run(input_ids=ids, use_cache=False, output_hidden_states=True)
        self.now = output.hidden_states[1:]
