"""Every way in which torch wraps, shards, stages or exports a module that `docs/integrations.md` speaks of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import insitu
from insitu.testing import Recording

SCRIPT: Final = Path(__file__).with_name("torch_ranks.py")


@dataclass(frozen=True)
class Found:
    """What came of one way."""

    num_steps: int = 0
    num_forwards: int = 0
    fired: int = 0
    num_sites: int = 0
    is_same: bool = True
    refused: str = ""


@dataclass(frozen=True)
class TorchMode:
    """One way to have a module of torch."""

    title: str
    run: Callable[[], Found]
    note: str = ""


@cache
def ranks() -> list[dict[str, Any]]:
    """Return what two ranks of torchrun found, in order of rank."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "INSITU_RUN": "0123456789abcdef"}
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launcher = subprocess.Popen([*run, str(SCRIPT), folder], env=environment, stderr=subprocess.PIPE, text=True)
        try:
            _, said = launcher.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its ranks
            raise
        assert launcher.returncode == 0, said[-4000:]
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


def of_ranks(name: str) -> Found:
    """Return what a rank found, where both found the same."""
    fields = ("num_steps", "num_forwards", "fired", "num_sites", "is_same")
    first, second = ({field: rank[name][field] for field in fields} for rank in ranks())
    if name != "stages":
        assert first == second
    return Found(**{field: min(first[field], second[field]) for field in fields})


class Small(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layers(x)
        return output


X: Final = torch.linspace(-1, 1, 24).reshape(3, 8)


def attached(model: Any, expected: torch.Tensor) -> Found:
    """Attach, run three forwards, and say what was seen; or why it was refused, the model being as it was."""
    records = Recording()
    try:
        session = insitu.attach(model, to=records)
    except ValueError as error:
        is_same = not isinstance(model, nn.Module) or torch.equal(model(X), expected)
        return Found(refused=str(error), is_same=is_same)
    with torch.no_grad():
        outputs = [model(X) for _ in range(3)]
    coverage = session.coverage()
    session.close()
    is_same = all(torch.equal(each, expected) for each in outputs)
    return Found(len(records.rows("steps")), 3, coverage.fired, len(session.sites()), is_same)


def _exported() -> torch.export.ExportedProgram:
    return torch.export.export(Small().eval(), (X,))


def _of(make: Callable[[], Any]) -> Callable[[], Found]:
    def run() -> Found:
        with torch.no_grad():
            return attached(make(), Small().eval()(X))

    return run


def _exported_attached() -> Found:
    """Export a module that is attached: the export is that of the module alone, and the module stays attached."""
    model = Small().eval()
    expected, records = model(X), Recording()
    session = insitu.attach(model, to=records)
    program = torch.export.export(model, (X,)).module()
    same = torch.equal(program(X), expected)
    outputs = [model(X) for _ in range(3)]
    coverage = session.coverage()
    session.close()
    is_same = same and all(torch.equal(each, expected) for each in outputs)
    return Found(len(records.rows("steps")), 3, coverage.fired, len(session.sites()), is_same)


TORCH_MODES: Final = (
    TorchMode(
        "`DistributedDataParallel(model)`",
        lambda: of_ranks("ddp after"),
        "looked through; the rank is torch.distributed's",
    ),
    TorchMode("… attached before it is wrapped", lambda: of_ranks("ddp before")),
    TorchMode(
        "`FullyShardedDataParallel(model)`",
        lambda: of_ranks("fsdp1 after"),
        "sites have the names that they have without it",
    ),
    TorchMode("… attached before it is wrapped", lambda: of_ranks("fsdp1 before")),
    TorchMode("`fully_shard(model)`", lambda: of_ranks("fsdp2 after")),
    TorchMode("… attached before it is sharded", lambda: of_ranks("fsdp2 before")),
    TorchMode(
        "`PipelineStage`",
        lambda: of_ranks("stages"),
        "a step a micro-batch, `mb` its number; `recv_wait` on stages after the first",
    ),
    TorchMode(
        "`torch.compile(model)`",
        _of(lambda: torch.compile(Small().eval(), backend="eager")),
        'docs/probe.md, "Compiled models"',
    ),
    TorchMode("a module that is exported while it is attached", _exported_attached, "no tap is in the export"),
    TorchMode("`torch.export.unflatten(program)`", _of(lambda: torch.export.unflatten(_exported()))),
    TorchMode("`ExportedProgram.module()`", _of(lambda: _exported().module())),
    TorchMode("`ExportedProgram`", _of(_exported)),
)


@cache
def outcome(mode: TorchMode) -> Found:
    """Return what a mode gave; it runs once."""
    return mode.run()
