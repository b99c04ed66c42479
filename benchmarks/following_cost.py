"""What it costs a step of `generate` to know whose rows it computes: with and without, in turns, in one process.

python benchmarks/following_cost.py [--rounds 200] [--batch 1 16]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as hf
from interleaving import interleaved

import insitu
from insitu.testing import Recording

NEW_TOKENS = 8


def model() -> Any:
    torch.manual_seed(7)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=512, **sizes, pad_token_id=0, eos_token_id=None)).eval()


def measured(rounds: int, batch: int) -> str:
    """Return a line: medians of a step, and the median ratio with its bootstrap interval; an A/A pair beside it."""
    observed = model()
    session = insitu.attach(observed, to=Recording(), overhead_budget=1.0)
    state = session._state
    ids = torch.randint(6, 512, (batch, 16), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generate(follow: Any) -> Callable[[], None]:
        def call() -> None:
            session._state = follow  # the same session and model; without, its steps state no rows
            observed.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

        return call

    ways = {"followed": generate(state), "alone": generate(None), "alone again": generate(None)}
    wall, _ = interleaved(ways, rounds, random.Random(1), warm_up=5)
    session.close()
    ratios = {name: wall[name] / wall["alone"] for name in ("followed", "alone again")}
    order = np.random.default_rng(1)
    parts = []
    for name, ratio in ratios.items():
        medians = [np.median(order.choice(ratio, len(ratio))) for _ in range(1000)]
        low, high = np.percentile(medians, [2.5, 97.5])
        parts.append(f"{name} {np.median(ratio):.4f} [{low:.4f}, {high:.4f}]")
    per_step = np.median(wall["alone"]) / NEW_TOKENS * 1e3
    more = np.median(wall["followed"] - wall["alone"]) / NEW_TOKENS * 1e6
    return f"batch {batch}: step {per_step:.2f} ms, {more:+.0f} us a step; " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    for batch in asked.batch:
        print(measured(asked.rounds, batch), flush=True)
    print(f"{asked.rounds} rounds of {NEW_TOKENS} steps each, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
