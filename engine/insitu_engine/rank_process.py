"""The life of a rank's process: built, run, and gone without a trace when the driver is."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

import insitu
from insitu_engine.checkpoint import Checkpoint
from insitu_engine.errors import EngineError, PeerLost, one_line
from insitu_engine.inject import LOG_VARIABLE, Fault, check_faults, inherited_faults
from insitu_engine.injector import Injector, install
from insitu_engine.kv_cache import KvCache
from insitu_engine.messages import Failed, Ready, Stopped
from insitu_engine.rank import Rank
from insitu_engine.rank_link import DriverGone, Link
from insitu_engine.stage import Stage, heat
from insitu_engine.transport import Transport

_DIE_WITH_PARENT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What one rank is told when it starts."""

    rank: int
    layers: tuple[range, ...]
    """Global layer indices of every stage; this rank's are `layers[rank]`."""
    checkpoint: Checkpoint
    num_blocks: int
    token_budget: int
    dtype: str
    device: str
    to: str | None
    store: Path
    """File through which the ranks find each other."""
    driver_pid: int
    sample: float | None = None
    """Share of requests whose rows are taken unasked."""

    @property
    def num_ranks(self) -> int:
        return len(self.layers)


def attach(spec: RankSpec, stage: Stage) -> insitu.Session:
    """Return the rank's probe. Requests that opt in or are sampled give the rows after every layer, and logits."""
    if spec.to is None:
        return insitu.off()
    requests = spec.sample or "opt-in"
    rules, axes = [insitu.Rule(sites="L*.resid_post", requests=requests)], {}
    if stage.is_last:
        rules.append(insitu.Rule(sites="logits", requests=requests))
        axes = {"final_norm": "samples", "logits": "samples"}
    return insitu.attach(
        stage,
        to=spec.to,
        rules=rules,
        role="rank",
        rank=spec.rank,
        stage=spec.rank,
        pp_rank=spec.rank,
        model_name=spec.checkpoint.name,
        max_rows=spec.token_budget,
        axes=axes,
    )


def build(spec: RankSpec, link: Link) -> Rank:
    """Load the stage, find the neighbours, warm the kernels, attach. Raises EngineError, ValueError, OSError."""
    faults = inherited_faults()
    check_faults(faults, spec.num_ranks, spec.checkpoint.num_layers)
    torch.set_num_threads(1)
    checkpoint, layers = spec.checkpoint, spec.layers[spec.rank]
    device, dtype = device_of(spec), getattr(torch, spec.dtype)
    hidden_size = checkpoint.config.hidden_size
    transport = None
    if spec.num_ranks > 1:
        transport = Transport(spec.rank, spec.num_ranks, spec.store, hidden_size, dtype)
    stage = Stage(checkpoint, layers)
    stage.load(checkpoint, dtype, device)
    cache = KvCache(layers, spec.num_blocks, checkpoint.num_kv_heads, checkpoint.head_dim, dtype, device)
    heat(stage, cache, hidden_size, device)
    # What start-up made stays for good: no later collection has to walk it.
    gc.collect()
    gc.freeze()
    injector = _install(faults, spec, stage)
    session = attach(spec, stage)
    return Rank(spec.rank, spec.num_ranks, link, stage, cache, transport, session, injector)


def device_of(spec: RankSpec) -> torch.device:
    """Return the rank's device: with several GPUs one each, else the one there is. Raises EngineError for none."""
    if spec.device != "cuda":
        return torch.device(spec.device)
    if not torch.cuda.is_available():
        raise EngineError("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device("cuda", spec.rank % torch.cuda.device_count())


def _install(faults: Sequence[Fault], spec: RankSpec, stage: Stage) -> Injector | None:
    log = os.environ.get(LOG_VARIABLE)
    layers = spec.layers[spec.rank]
    injector = install(
        stage, faults, layers=layers, stage_number=spec.rank, rank=spec.rank, log=Path(log) if log else None
    )
    gc.freeze()
    return injector


def rank_main(spec: RankSpec, end: socket.socket, inherited: Sequence[socket.socket]) -> None:
    """Run a rank in this process until the driver says stop, goes away, or something breaks. Exits the process."""
    for other in inherited:
        other.close()
    _leave_no_orphan(spec.driver_pid)
    link, rank, status = Link(end), None, 1
    try:
        with torch.inference_mode():
            rank = build(spec, link)
            link.send(Ready(rank.param_bytes))
            rank.run()
        link.send(Stopped(rank.close()))
        status = 0
    except Exception as error:
        if not isinstance(error, DriverGone):
            with suppress(DriverGone):
                link.send(Failed(_reason(error), isinstance(error, PeerLost)))
        if rank is not None:
            rank.abandon()
    os._exit(status)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, EngineError | OSError | ValueError) else one_line(error)


def _leave_no_orphan(driver_pid: int) -> None:
    """Die with the driver; leave signals and stdout to it."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != driver_pid:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)
