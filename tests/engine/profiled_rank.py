"""One rank of the engine under torch's own profiler.

Run as a script by the tests: profiled_rank.py RANK NUM_RANKS SOCKET_FD CHECKPOINT FOLDER [BOOT_ID]. The rank is the
engine's: built, run and closed by what `rank_main` calls. What torch saw of its sends and receives goes to
`FOLDER/torch-RANK.json`, an account that shares nothing with the probe's. BOOT_ID: what the rank takes for its
kernel's, as if it ran on a host of its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import torch
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
with torch.inference_mode():
    engine = build(spec, link)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        link.send(Ready(engine.param_bytes))
        engine.run()
    engine.close()

trace = folder / f"trace-{rank}.json"
seen.export_chrome_trace(str(trace))
whole = json.loads(trace.read_text())
wanted = [event for event in whole["traceEvents"] if event.get("name", "").startswith(("c10d::", "gloo:"))]
base = whole["baseTimeNanoseconds"]
(folder / f"torch-{rank}.json").write_text(json.dumps({"base_unix_ns": base, "events": wanted}))
