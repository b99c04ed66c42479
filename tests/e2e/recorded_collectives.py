"""One run of the example of two tensor-parallel ranks, each of which leaves what torch's flight recorder has.

Run as a script by the tests: recorded_collectives.py FOLDER STEPS. The records go to `FOLDER/torch-RANK.json`, the
store to `FOLDER/store`.
"""

from __future__ import annotations

import os
import runpy
import sys
from argparse import Namespace
from multiprocessing import get_context
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples/03_tensor_parallel.py"


def run(rank: int, folder: Path, steps: int) -> None:
    """Run one rank. torch reads the size of its recorder when it is first used."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

    leave = dist.destroy_process_group

    def recorded() -> None:
        (folder / f"torch-{rank}.json").write_bytes(_dump_fr_trace_json())
        leave()

    dist.destroy_process_group = recorded  # type: ignore[assignment]
    options = Namespace(to=f"file://{folder}/store", steps=steps, late=0, after=0, busy=False, ms=4.0)
    runpy.run_path(str(EXAMPLE))["run"](rank, 2, f"{folder}/meeting", options)


if __name__ == "__main__":
    os.environ |= {"TORCH_FR_BUFFER_SIZE": "20000", "INSITU_RUN": "0123456789abcdef"}
    spawn = get_context("spawn")
    ranks = [spawn.Process(target=run, args=(rank, Path(sys.argv[1]), int(sys.argv[2]))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
