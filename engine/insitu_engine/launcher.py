"""Starts the ranks: imports once, opens the checkpoint once, then forks (on CUDA: spawns) one process a rank."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

import torch

from insitu.identity import current_run
from insitu_engine.checkpoint import Checkpoint, open_checkpoint
from insitu_engine.config import EngineConfig, Plan, make_plan
from insitu_engine.inject import forget_faults
from insitu_engine.rank_process import RankSpec, rank_main

LEAVE_S: Final = 3.0
"""How long ranks may take to go when the driver lets go of them."""


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A running rank, and the driver's end of its socket."""

    rank: int
    process: BaseProcess
    end: socket.socket


@dataclass(frozen=True, slots=True)
class Launched:
    """Everything the driver goes on with."""

    checkpoint: Checkpoint
    plan: Plan
    ranks: tuple[RankProcess, ...]
    folder: tempfile.TemporaryDirectory[str]
    """Holds the file through which the ranks find each other."""

    def close(self) -> None:
        """Leave no rank and no file behind, however the driver ended. Safe to call twice."""
        for rank in self.ranks:
            rank.end.close()  # a rank that is idle goes by itself
        deadline = time.monotonic() + LEAVE_S
        for rank in self.ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
            if rank.process.exitcode is None:
                rank.process.kill()
                rank.process.join()
        self.folder.cleanup()


def launch(config: EngineConfig, listener: socket.socket) -> Launched:
    """Open the checkpoint and start its ranks. Raises EngineError before any process exists.

    No thread, channel or CUDA context exists in this process yet, so a fork is safe; ranks inherit the imports.
    """
    torch.set_num_threads(1)
    current_run()  # made here, so that driver and ranks are one run
    checkpoint = open_checkpoint(config.model)
    plan = make_plan(config, checkpoint)
    folder = tempfile.TemporaryDirectory(prefix="insitu-")
    # What is imported stays: no collector has to walk it, and the ranks go on sharing its pages.
    gc.freeze()
    gc.enable()
    specs = [_spec(config, checkpoint, plan, rank, Path(folder.name)) for rank in range(config.num_stages)]
    ranks = _start(specs, listener, spawned=config.device != "cpu")
    forget_faults()
    return Launched(checkpoint, plan, ranks, folder)


def _spec(config: EngineConfig, checkpoint: Checkpoint, plan: Plan, rank: int, folder: Path) -> RankSpec:
    return RankSpec(
        rank=rank,
        layers=plan.layers,
        checkpoint=checkpoint,
        num_blocks=plan.limits.num_blocks,
        token_budget=config.token_budget,
        dtype=config.dtype,
        device=config.device,
        to=config.to,
        store=folder / "ranks",
        driver_pid=os.getpid(),
        sample=config.sample,
    )


def _context(spawned: bool) -> SpawnContext | ForkContext:
    return multiprocessing.get_context("spawn") if spawned else multiprocessing.get_context("fork")


def _start(specs: Sequence[RankSpec], listener: socket.socket, *, spawned: bool) -> tuple[RankProcess, ...]:
    context = _context(spawned)
    pairs = [socket.socketpair() for _ in specs]
    ranks = []
    for spec, (ours, theirs) in zip(specs, pairs, strict=True):
        # A forked rank holds copies of all that is open here; it lets go of what is not its own.
        others = [listener, *(end for pair in pairs for end in pair if end is not theirs)]
        process = context.Process(
            target=rank_main,
            args=(spec, theirs, [] if spawned else others),
            name=f"insitu-rank-{spec.rank}",
            daemon=True,
        )
        process.start()
        ranks.append(RankProcess(spec.rank, process, ours))
    for _, theirs in pairs:
        theirs.close()
    return tuple(ranks)
