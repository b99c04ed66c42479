"""What insitu costs each way to run a model that docs/integrations.md has: attached and detached, in turns.

python benchmarks/integration_cost.py                                  # about four minutes
python benchmarks/integration_cost.py --only generate PipelineStage --batch 16 --model 100m
python benchmarks/integration_cost.py --quick                          # each once or twice: that it runs

Two copies of a model that are not attached (what a pair of equals comes to) and one that is, with the rules it has by
default and `overhead_budget=1.0`, so that no governor hides the price; it writes a store in a folder. Ways take turns
in random order. Printed are the medians of ratios of the same round with their bootstrap 95 % intervals, of wall time
and of the CPU time of the process that runs the model (of ranks the first), which others change less. Torch has one
thread in each process: two ranks, or a server and its client, are all that two cores hold, and the probe's own threads
share these. What a turn left is flushed after it, outside of the clock, and the time of that is printed beside it (a
session that is not asked to ships once a second). A server cannot be flushed: there a turn is several requests.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch
from foreign import Foreign
from integration_generate import generate, generate_batch
from integration_ranks import CASES as RANK_CASES
from integration_ranks import measured as of_ranks
from integration_serve import served
from integration_turns import Job, Measured
from llamas import NAMES

CASES: Final[Mapping[str, Callable[[Job], Measured]]] = {
    "generate": generate,
    "generate_batch": generate_batch,
    "serve": partial(served, is_continuous=False),
    "serve-batching": partial(served, is_continuous=True),
    **{name: partial(of_ranks, name) for name in RANK_CASES},
}
ALONE: Final = ("serve", "serve-batching")
"""Cases in which one request runs at a time, whatever the batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--model", choices=NAMES, default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=8, help="of a turn; tokens of a request")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 steps, batch 4")
    asked = parser.parse_args()
    rounds, steps, batches = (2, 2, [4]) if asked.quick else (asked.rounds, asked.steps, asked.batch)
    torch.set_num_threads(1)
    for name in asked.only:
        for batch in [1] if name in ALONE else batches:
            with tempfile.TemporaryDirectory(prefix="insitu-cost-") as folder, Foreign() as foreign:
                found = CASES[name](Job(asked.model, batch, steps, rounds, Path(folder)))
            print(f"{found.line()}; others took {foreign.share:.1%} of the cores", flush=True)
    print(f"{rounds} rounds of {steps} steps, model {asked.model}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
