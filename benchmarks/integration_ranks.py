"""What attaching costs two ranks of torchrun over gloo: plain, wrapped, sharded, and as the stages of a pipeline.

`measured` starts the ranks; each runs this file. All have every way's model, take the same turns in the same order, and
a turn lasts from a barrier to the next, as rank 0 sees it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from integration_generate import attached, prompts
from integration_turns import AGAIN, ATTACHED, DETACHED, Job, Measured, flushed_turns, model_of
from torch.distributed import barrier, destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from two_rank_models import Stage

NUM_RANKS: Final = 2
MOST_MICRO_BATCHES: Final = 4
RUN_S: Final = 300.0
TAKEN: Final = "taken.json"
"""Wall and CPU-seconds of turns by way, and seconds of a flush, as rank 0 saw them."""

Made = tuple[Any, Callable[[], None]]
"""What is attached to, and a step."""


def plain(model: Any, ids: torch.Tensor) -> Made:
    return model, lambda: model(ids, use_cache=False)


def data_parallel(model: Any, ids: torch.Tensor) -> Made:
    return plain(DistributedDataParallel(model), ids)


def sharded(model: Any, ids: torch.Tensor) -> Made:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return plain(fully_shard(model, mesh=mesh), ids)


def sharded_flat(model: Any, ids: torch.Tensor) -> Made:
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return plain(FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu")), ids)


def staged(model: Any, ids: torch.Tensor) -> Made:
    stage = PipelineStage(Stage(model, get_rank(), ""), get_rank(), NUM_RANKS, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, min(MOST_MICRO_BATCHES, len(ids)))
    given = [ids] if get_rank() == 0 else []
    return stage, lambda: schedule.eval(*given)


CASES: Final[Mapping[str, Callable[[Any, torch.Tensor], Made]]] = {
    "torchrun": plain,
    "DistributedDataParallel": data_parallel,
    "FullyShardedDataParallel": sharded_flat,
    "fully_shard": sharded,
    "PipelineStage": staged,
}


def measured(case: str, job: Job) -> Measured:
    """Run two ranks of torchrun. Raises RuntimeError with what they said last, TimeoutExpired."""
    asked = json.dumps({"case": case, "job": {**asdict(job), "folder": str(job.folder)}})
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = subprocess.Popen([*run, __file__, asked], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, said = ranks.communicate(timeout=RUN_S)
    except subprocess.TimeoutExpired:
        ranks.terminate()  # it ends its ranks
        raise
    if ranks.returncode:
        raise RuntimeError(f"{case}: torchrun ended with {ranks.returncode}: {said[-2000:]}")
    *times, flush_s = json.loads((job.folder / TAKEN).read_text())
    unit = f"batch of {min(MOST_MICRO_BATCHES, job.batch)} micro-batches" if case == "PipelineStage" else "step"
    name = f"{case}, batch {job.batch}"
    wall, cpu = ({way: np.asarray(each) for way, each in taken.items()} for taken in times)
    return Measured(name, unit, job.steps, wall, cpu, flush_s)


def rank(case: str, job: Job) -> None:
    """Take this rank's part; rank 0 writes what turns took."""
    ids = prompts(job)
    made = {name: CASES[case](model_of(job), ids) for name in (DETACHED, AGAIN, ATTACHED)}

    def turn(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(job.steps):
                step()
            barrier()

        return run

    with ExitStack() as opened, torch.no_grad():
        sessions = {ATTACHED: attached(made[ATTACHED][0], job, opened)}
        wall, cpu, flush_s = flushed_turns(
            job, {name: turn(step) for name, (_, step) in made.items()}, sessions, meet=barrier
        )
        assert sessions[ATTACHED].coverage().fired, "nothing was observed"
    if get_rank() == 0:
        taken = [*({name: each.tolist() for name, each in times.items()} for times in (wall, cpu)), flush_s]
        (job.folder / TAKEN).write_text(json.dumps(taken))


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    init_process_group("gloo")
    rank(asked["case"], Job(**{**asked["job"], "folder": Path(asked["job"]["folder"])}))
    destroy_process_group()


if __name__ == "__main__":
    main()
