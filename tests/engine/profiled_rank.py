"""One rank of the engine under torch's own profiler, and its flight recorder where TORCH_FR_BUFFER_SIZE is set.

Run as a script by the tests: profiled_rank.py RANK NUM_RANKS SOCKET_FD CHECKPOINT FOLDER [BOOT_ID]. The rank is the
engine's: built, run and closed by what `rank_main` calls. What torch saw of its sends and receives goes to
`FOLDER/torch-RANK.json`, an account that shares nothing with the probe's, and what its flight recorder holds to
`FOLDER/recorded-RANK.json`. Of gloo's operations that writes down collectives alone, so hidden states then travel by
broadcasts among two. BOOT_ID: what the rank takes for its kernel's, as if it ran on a host of its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from insitu_engine import transport
from insitu_engine.checkpoint import open_checkpoint
from insitu_engine.messages import Ready
from insitu_engine.rank_link import Link
from insitu_engine.rank_process import RankSpec, build
from insitu_engine.split import balanced, ranges

rank, num_ranks, fd = map(int, sys.argv[1:4])
checkpoint, folder = open_checkpoint(Path(sys.argv[4])), Path(sys.argv[5])
if len(sys.argv) > 6:
    transport.boot_id = lambda: sys.argv[6]  # type: ignore[attr-defined]

link = Link(socket.socket(fileno=fd))
spec = RankSpec(
    rank=rank,
    layers=tuple(ranges(balanced(checkpoint.layer_bytes, checkpoint.head_bytes, num_ranks))),
    checkpoint=checkpoint,
    num_blocks=16,
    token_budget=64,
    dtype="float32",
    device="cpu",
    to=f"file://{folder / 'store'}",
    store=folder / "ranks",
    driver_pid=os.getppid(),
)


def send_by_broadcasts() -> None:
    """Let a send and its receive be a broadcast among both ranks: as asynchronous, and over the same gloo."""
    both = dist.new_group([0, 1])

    def carry(tensor: torch.Tensor, peer: int, tag: int) -> Any:
        return dist.broadcast(tensor, src=0, group=both, async_op=True)

    dist.isend = dist.irecv = carry  # type: ignore[assignment]


is_recorded = "TORCH_FR_BUFFER_SIZE" in os.environ
with torch.inference_mode():
    engine = build(spec, link)
    if is_recorded:
        send_by_broadcasts()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        link.send(Ready(engine.param_bytes))
        engine.run()
    (folder / f"recorded-{rank}.json").write_bytes(_dump_fr_trace_json())
    engine.close()

trace = folder / f"trace-{rank}.json"
seen.export_chrome_trace(str(trace))
whole = json.loads(trace.read_text())
wanted = [event for event in whole["traceEvents"] if event.get("name", "").startswith(("c10d::", "gloo:"))]
base = whole["baseTimeNanoseconds"]
(folder / f"torch-{rank}.json").write_text(json.dumps({"base_unix_ns": base, "events": wanted}))
