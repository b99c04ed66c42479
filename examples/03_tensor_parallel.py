"""Two tensor-parallel ranks on this machine: which of them comes late to the all-reduce, and what does it cost?

python examples/03_tensor_parallel.py --late 1 && insitu stalls ./insitu-store --matrix
"""

import argparse
import gc
import os
import secrets
import sys
import tempfile
import time
from multiprocessing import get_context

import torch
import torch.distributed as dist
from torch import nn

import insitu

WIDTH, HIDDEN, LAYERS, BATCH = 256, 1024, 2, 32


class Shard(nn.Module):
    """One rank's half of an MLP: columns of the first matrix, rows of the second, then a sum over the ranks."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN // num_ranks)
        self.down = nn.Linear(HIDDEN // num_ranks, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        partial: torch.Tensor = self.down(torch.relu(self.up(x)))
        with insitu.interval("collective_wait"):  # the step's time in here is waiting for the others
            dist.all_reduce(partial)
        return x + partial


def dawdle(seconds: float, busy: bool) -> None:
    """Sleep, or compute for so long on the core."""
    if not busy:
        time.sleep(seconds)
        return
    until, x = time.thread_time() + seconds, torch.randn(64, 64)
    while time.thread_time() < until:
        x = (x @ x).tanh()


def run(rank: int, num_ranks: int, meeting: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_ranks)
    model = nn.Sequential(*(Shard(num_ranks) for _ in range(LAYERS))).eval()
    x = torch.randn(BATCH, WIDTH)
    with (
        insitu.attach(model, to=options.to, rank=rank, stage=0, tp_rank=rank) as session,
        torch.inference_mode(),
    ):
        gc.freeze()  # what start-up made stays for good: no collection has to walk it
        for number in range(options.steps):
            with session.step(number):
                if rank == options.late and number >= options.after:
                    with session.interval("compute" if options.busy else "host"):
                        dawdle(options.ms / 1e3, options.busy)
                model(x)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--late", type=int, default=-1, help="the rank that is late in each step")
    parser.add_argument("--busy", action="store_true", help="it computes meanwhile; else it sleeps")
    parser.add_argument("--after", type=int, default=0, help="from which step on")
    parser.add_argument("--ms", type=float, default=6.0, help="for how long")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--to", default="file://./insitu-store")
    arguments = parser.parse_args()
    os.environ.setdefault("INSITU_RUN", secrets.token_hex(8))  # made here, so that both ranks write one run
    with tempfile.TemporaryDirectory() as folder:
        spawn = get_context("spawn")
        ranks = [
            spawn.Process(target=run, args=(rank, 2, f"{folder}/meeting", arguments), daemon=True) for rank in (0, 1)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    sys.exit(any(process.exitcode for process in ranks))
