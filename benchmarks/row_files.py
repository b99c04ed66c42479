"""Hidden states on disk, as somebody without a probe would keep them: files of torch or safetensors, each synced."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Final

import numpy as np
import torch
from llamas import flat
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

STEPS_A_FILE: Final = 4
"""Of a writer on a thread: fewer files mean fewer syncs, more files mean that it begins sooner."""

Steps = Mapping[int, Sequence[torch.Tensor]]
"""By step what each layer handed on."""


@dataclass(frozen=True, slots=True)
class Format:
    """How tensors become a file."""

    suffix: str
    save: Callable[[Steps, Path], None]
    load: Callable[[Path], Steps]


def _save_flat(steps: Steps, path: Path) -> None:
    named = {f"{step}.{layer}": x for step, states in steps.items() for layer, x in enumerate(states)}
    save_file({name: x.contiguous() for name, x in named.items()}, path)


def _load_flat(path: Path) -> Steps:
    found: dict[int, dict[int, torch.Tensor]] = {}
    for name, x in load_file(path).items():
        step, layer = name.split(".")
        found.setdefault(int(step), {})[int(layer)] = x
    return {step: [layers[at] for at in sorted(layers)] for step, layers in found.items()}


TORCH: Final = Format(
    ".pt",
    lambda steps, path: torch.save({step: list(states) for step, states in steps.items()}, path),
    lambda path: torch.load(path, weights_only=True),
)
SAFETENSORS: Final = Format(".safetensors", _save_flat, _load_flat)


class RowFiles:
    """Keeps what steps left until it is written: at the next `settle`, or on a thread while the steps go on."""

    def __init__(self, folder: Path, format_: Format, *, on_thread: bool) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._format = format_
        self._pending: dict[int, Sequence[torch.Tensor]] = {}
        self._queue: Queue[Steps] | None = Queue() if on_thread else None
        self._error: Exception | None = None
        if on_thread:
            Thread(target=self._work, daemon=True).start()

    def put(self, step: int, states: Sequence[torch.Tensor]) -> None:
        """Take what one step left; the tensors are the writer's from here on."""
        self._pending[step] = states
        if self._queue is not None and len(self._pending) >= STEPS_A_FILE:
            self._hand_over()

    def settle(self) -> None:
        """Return once everything is on the disk, names of files included. Raises OSError."""
        self._hand_over()
        if self._queue is not None:
            self._queue.join()
        if self._error is not None:
            raise self._error
        _sync(self._folder)

    def read(self) -> dict[int, list[NDArray[np.float32]]]:
        """Return by step what each layer handed on, [tokens, width], from the files alone."""
        found = {}
        for path in self._folder.glob(f"*{self._format.suffix}"):
            for step, states in self._format.load(path).items():
                found[step] = [flat(x) for x in states]
        return found

    def _hand_over(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        if self._queue is None:
            self._write(pending)
        else:
            self._queue.put(pending)

    def _work(self) -> None:
        assert self._queue is not None, "a writer on a thread has a queue"
        while True:
            steps = self._queue.get()
            try:
                self._write(steps)
            except Exception as error:
                self._error = error
            finally:
                self._queue.task_done()

    def _write(self, steps: Steps) -> None:
        path = self._folder / f"{min(steps):08d}{self._format.suffix}"
        self._format.save(steps, path)
        _sync(path)


def _sync(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
