"""Two stages of torch.distributed.pipelining, and how long the second waits for the first.

torchrun --standalone --nproc-per-node 2 examples/09_pipelining.py && insitu stalls insitu-store
"""

import torch
from torch import nn
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import insitu

init_process_group("gloo")
layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)])
module = layers[:2] if get_rank() == 0 else layers[2:]
stage = PipelineStage(module, get_rank(), 2, torch.device("cpu"))
session = insitu.attach(stage, to="file://./insitu-store")

schedule = ScheduleGPipe(stage, n_microbatches=4)
with torch.no_grad():
    for _ in range(20):
        schedule.eval(*([torch.randn(32, 64)] if get_rank() == 0 else []))
print(f"rank {get_rank()}: {session.close()}")
destroy_process_group()
