"""What the plug-in costs vLLM: engines with and without it serve the same blocks in turns, and their times are paired.

    VLLM_PYTHON=.venv-vllm/bin/python .venv/bin/python benchmarks/vllm_overhead.py
    ... --rounds 60 --json
    ... --model 100m --rounds 20          # random weights, the larger model of bench-probe

One rank, eager, on one core that it shares with all of its own threads: nothing is hidden on a spare one. Ways: `bare`
twice (what pairs of equals come to), `T0` (the plug-in as it starts) and `rows` (every request asks for the rows of all
layers and logits). Ends with 5 where it was too noisy to say.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from foreign import Foreign
from llamas import NAMES, TINY, build
from overhead_figures import MOST_FOREIGN, Ratio, paired
from workers import Worker

from insitu_collector.store import open_store

BARE, AGAIN, T0, ROWS = "bare", "bare again", "T0", "rows"
WAYS: Final = (BARE, AGAIN, T0, ROWS)
NUM_TOKENS: Final = 48
WARM_UP: Final = 2
TOO_NOISY: Final = 5


def environment(way: str, store: Path) -> dict[str, str]:
    return {
        "INSITU_ENABLED": "" if way in (BARE, AGAIN) else "1",
        "INSITU_TO": f"file://{store}",
        "VLLM_PLUGINS": "insitu",
        "VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def checkpoint_of(model: str, folder: Path) -> Path:
    """Return where a model of `llamas` lies that vLLM can load, written there if it is not shipped."""
    if model != "tiny":
        build(model).save_pretrained(folder / model)
    return TINY if model == "tiny" else folder / model


def measure(python: str, model: Path, folder: Path, rounds: int, seed: int) -> dict[str, Any]:
    """Return the ratios, what was stored, and how much of the cores others took."""
    order, workers = random.Random(seed), dict[str, Worker]()
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens = []
    try:
        for way in WAYS:
            extra = {"insitu": "capture=rows"} if way == ROWS else None
            job = {"model": str(model), "num_tokens": NUM_TOKENS, "extra": extra}
            place = folder / way.replace(" ", "-")
            workers[way] = Worker(python, job, place, environment(way, folder / f"store-{way}"), "vllm_worker.py")
        for worker in workers.values():
            worker.ask("block")  # it is loaded, and warm
        with Foreign() as foreign:
            for number in range(WARM_UP + rounds):
                for way in order.sample(WAYS, len(WAYS)):
                    found = workers[way].ask("block")
                    tokens.append(found["tokens"])
                    if number >= WARM_UP:
                        wall[way].append(found["wall_s"])
                        cpu[way].append(found["cpu_s"])
    finally:
        for worker in workers.values():
            worker.close()
    assert all(each == tokens[0] for each in tokens), "every way answers with the same tokens"
    stored = {way: rows_of(folder / f"store-{way}") for way in (T0, ROWS)}
    ratios = [paired(way, wall[BARE], wall[way]) for way in WAYS[1:]]
    used = [paired(way, cpu[BARE], cpu[way]) for way in WAYS[1:]]
    return {
        "rounds": rounds,
        "block_s": float(np.median(wall[BARE])),
        "wall": [asdict(each) for each in ratios],
        "cpu": [asdict(each) for each in used],
        "stored": stored,
        "foreign": foreign.share,
        "noisy": foreign.share > MOST_FOREIGN or any(each.is_noisy for each in ratios),
    }


def rows_of(store: Path) -> dict[str, int]:
    opened = open_store(str(store))
    return {name: opened.table(name).num_rows for name in opened.tables()}


def text_of(found: dict[str, Any]) -> str:
    """Return it for people."""
    lines = [f"{found['rounds']} rounds of blocks of {found['block_s']:.2f} s; others took {found['foreign']:.0%}"]
    for name in ("wall", "cpu"):
        for ratio in (Ratio(**each) for each in found[name]):
            lines.append(f"{name:>5}  {ratio.name:<11} {ratio.median:.4f}  [{ratio.low:.4f}, {ratio.high:.4f}]")
    lines += [f"stored by {way}: {rows}" for way, rows in found["stored"].items()]
    return "\n".join([*lines, *(["too noisy"] if found["noisy"] else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="tiny")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        parser.error("VLLM_PYTHON names no interpreter that has vLLM; `make test-vllm` makes .venv-vllm")
    with tempfile.TemporaryDirectory(prefix="insitu-vllm-") as made:
        found = measure(python, checkpoint_of(options.model, Path(made)), Path(made), options.rounds, options.seed)
    print(json.dumps(found, indent=2) if options.json else text_of(found))
    return TOO_NOISY if found["noisy"] else 0


if __name__ == "__main__":
    sys.exit(main())
