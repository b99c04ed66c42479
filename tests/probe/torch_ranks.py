"""What each rank that torchrun starts does: every way to shard or to stage a module, observed; says what came of it.

Run as `torchrun --nproc-per-node 2 torch_ranks.py FOLDER`; writes FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from small_models import DECODER
from torch import nn
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import insitu
from insitu.testing import Recording

IDS = torch.tensor([[7, 8, 9, 10], [4, 3, 2, 1]])
NUM_FORWARDS = 3
NUM_MICRO_BATCHES = 4


def llama() -> Any:
    torch.manual_seed(7)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)).eval()


def ddp(model: Any) -> Any:
    return DistributedDataParallel(model)


def fsdp1(model: Any) -> Any:
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}), device_id=device)


def fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def observed(wrap: Callable[[Any], Any], is_wrapped_first: bool) -> dict[str, Any]:
    """Attach before or after wrapping, run a few forwards, and say what was seen and whether outputs are the same."""
    with torch.no_grad():
        expected = wrap(llama())(IDS).logits
        records, model = Recording(), llama()
        model = wrap(model) if is_wrapped_first else model
        session = insitu.attach(model, to=records)
        model = model if is_wrapped_first else wrap(model)
        outputs = [model(IDS).logits for _ in range(NUM_FORWARDS)]
        coverage = session.coverage()
        session.close()
        after = model(IDS).logits
    return {
        "num_steps": len(records.rows("steps")),
        "num_forwards": NUM_FORWARDS,
        "fired": coverage.fired,
        "num_sites": len(session.sites()),
        "names": [site.name for site in session.sites()],
        "is_same": all(torch.equal(each, expected) for each in [*outputs, after]),
        "rank": records.rows("sources")[0]["rank"],
    }


def staged() -> dict[str, Any]:
    """Run a pipeline of two stages, one a rank."""
    torch.manual_seed(3)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)]
    rank, records = get_rank(), Recording()
    inputs = torch.linspace(-1, 1, 8 * 16).reshape(8, 16)
    with torch.no_grad():
        expected = torch.cat([layers[1](layers[0](each)) for each in inputs.chunk(NUM_MICRO_BATCHES)])
    stage = PipelineStage(layers[rank], rank, 2, torch.device("cpu"))
    session = insitu.attach(stage, to=records)
    schedule = ScheduleGPipe(stage, NUM_MICRO_BATCHES)
    outputs = []
    with torch.no_grad():
        for _ in range(NUM_FORWARDS):
            outputs.append(schedule.eval(*([inputs] if rank == 0 else [])))
    coverage = session.coverage()
    session.close()
    return {
        "num_steps": len(records.rows("steps")),
        "num_forwards": 1 + NUM_FORWARDS * NUM_MICRO_BATCHES,  # a schedule first tries what shapes there are
        "fired": coverage.fired,
        "num_sites": len(session.sites()),
        "is_same": rank == 0 or all(torch.equal(each, expected) for each in outputs),
        "source": {name: records.rows("sources")[0][name] for name in ("rank", "stage", "pp_rank")},
        "steps": [(step["step_id"], step["mb"]) for step in records.rows("steps")],
        "intervals": [
            {name: each[name] for name in ("cls", "step_id", "mb", "peer", "bytes", "t0_ns", "t1_ns")}
            for each in records.rows("intervals")
        ],
        "left": sorted(name for name in vars(stage) if name in ("get_fwd_recv_ops", "forward_one_chunk")),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, wrap in {"ddp": ddp, "fsdp1": fsdp1, "fsdp2": fsdp2}.items():
        for when in ("before", "after"):
            found[f"{name} {when}"] = observed(wrap, when == "after")
    found["stages"] = staged()
    (folder / f"{get_rank()}.json").write_text(json.dumps(found))
    destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
