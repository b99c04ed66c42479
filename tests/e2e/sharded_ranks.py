"""Two tensor-parallel ranks of a Llama that record rows of what they hold of it.

Each has half of the heads and of the MLP's columns, and adds its part to the other's where a row of them ends, as
transformers' plan for this model has it.

python tests/e2e/sharded_ranks.py STORE
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

TOKENS = [3, 14, 15, 92, 65, 35]
SITES = ("L0.q", "L1.attn_z", "L1.mlp_act", "L1.resid_post")


class Summed(nn.Module):
    """Rows of a matrix, whose product is added up over the ranks."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = nn.functional.linear(x, self.weight)
        dist.all_reduce(part)
        return part


def llama() -> Any:
    """Return a small one, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def shard(model: Any, rank: int) -> None:
    """Keep of each layer what a rank of two has."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight = nn.Parameter(linear.weight.chunk(2, dim=0)[rank].clone(), requires_grad=False)
        attention.o_proj = Summed(attention.o_proj.weight.chunk(2, dim=1)[rank].clone())
        mlp.down_proj = Summed(mlp.down_proj.weight.chunk(2, dim=1)[rank].clone())


def run(rank: int, meeting: str, to: str) -> None:
    import insitu

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    model = llama()
    shard(model, rank)
    rules = [insitu.Rule(sites=site, requests="all") for site in SITES]
    tokens = torch.tensor([TOKENS])
    with insitu.attach(model, to=to, rank=rank, stage=0, tp_rank=rank, rules=rules) as session, torch.inference_mode():
        for number, request in enumerate(("warm-up", "asked")):
            with session.step(number, rows=[insitu.Rows(request, start=0, count=len(TOKENS), position=0)]):
                model(tokens, use_cache=False)
            session.flush(timeout_s=30)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("INSITU_RUN", secrets.token_hex(8))
    with tempfile.TemporaryDirectory() as folder:
        spawn = get_context("spawn")
        ranks = [spawn.Process(target=run, args=(rank, f"{folder}/meeting", sys.argv[1])) for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(any(process.exitcode for process in ranks))
