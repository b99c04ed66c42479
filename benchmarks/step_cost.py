"""Step cost of T0: the same model bare and attached, interleaved at random step by step, with an A/A pair.

With `--summary` also of a step whose statistics are taken (T1), against one with T0 alone.

Prints the median of attached / bare step time with a bootstrap 95 % interval, and the same for two bare twins. An
A/A interval wider than 0.02 means this machine is too noisy to judge: exit code 5.
"""

from __future__ import annotations

import copy
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

import insitu
from insitu.testing import Recording

WIDTHS = {"tiny": (192, 512, 8), "100M": (768, 2048, 12)}
"""Name -> hidden size, intermediate size, layers."""
TOO_NOISY = 0.02


@dataclass(frozen=True)
class Ratio:
    """A median ratio with its bootstrap 95 % interval."""

    name: str
    median: float
    low: float
    high: float
    num_rounds: int
    step_ms: float


def ratio(name: str, base: list[float], other: list[float], seed: int) -> Ratio:
    """Return the median of the paired ratios other / base."""
    pairs = np.asarray(other) / np.asarray(base)
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(pairs, (2000, len(pairs))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    step_ms = float(np.median(base)) * 1e3
    return Ratio(name, float(np.median(pairs)), float(low), float(high), len(pairs), step_ms)


def build(size: str) -> Any:
    hidden, intermediate, layers = WIDTHS[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        vocab_size=2048,
    )
    return LlamaModel(config).eval()


@click.command()
@click.option("--size", type=click.Choice(list(WIDTHS)), default="tiny")
@click.option("--batch", default=8, help="Rows of one decode step.")
@click.option("--rounds", default=600)
@click.option("--compiled", is_flag=True, help="Each of them compiled (fullgraph, the same input sizes).")
@click.option("--summary", is_flag=True, help="Also a model whose every step is sampled, against T0.")
@click.option("--seed", default=0)
@click.option("--json", "as_json", is_flag=True)
def main(size: str, batch: int, rounds: int, compiled: bool, summary: bool, seed: int, as_json: bool) -> None:
    """Measure what T0 (and T1) adds to a step on the CPU, one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    bare = build(size)
    twin, attached = copy.deepcopy(bare), copy.deepcopy(bare)
    session = insitu.attach(attached, to=Recording(), max_rows=max(64, batch))
    sessions = {"attached": session}
    if summary:
        sampled = copy.deepcopy(bare)
        rule = insitu.Rule(sites="*", take="summary", every=1)
        sessions["sampled"] = insitu.attach(
            sampled, to=Recording(), max_rows=max(64, batch), rules=[rule], overhead_budget=1.0
        )
    x = torch.randn(batch, 1, bare.config.hidden_size)
    rows = [insitu.Rows(f"r{row}", start=row, count=1) for row in range(batch)]
    models: dict[str, Any] = {"bare": bare, "twin": twin, "attached": attached}
    if summary:
        models["sampled"] = sampled
    if compiled:
        models = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(seed)

    def run(name: str) -> float:
        began = time.perf_counter()
        if name in sessions:
            with sessions[name].step(rows=rows, phase="decode"):
                models[name](inputs_embeds=x, use_cache=False)
        else:
            models[name](inputs_embeds=x, use_cache=False)
        return time.perf_counter() - began

    with torch.inference_mode():
        for round_ in range(rounds + 20):
            for name in order.sample(list(models), len(models)):
                spent = run(name)
                if round_ >= 20:
                    times[name].append(spent)
    stats = session.stats()
    for each in sessions.values():
        each.close()
    results = [
        ratio("A/A (bare twin)", times["bare"], times["twin"], seed),
        ratio("T0 (attached)", times["bare"], times["attached"], seed),
    ]
    if summary:
        results.append(ratio("T1 (every step)", times["attached"], times["sampled"], seed))
    noisy = results[0].high - results[0].low > TOO_NOISY
    if as_json:
        document = {"schema": "insitu.bench.step_cost/1", "size": size, "batch": batch, "noisy": noisy}
        click.echo(json.dumps({**document, "results": [asdict(result) for result in results]}))
    else:
        click.echo(f"{size}, batch {batch}, {len(session.sites())} sites, load {os.getloadavg()[0]:.2f}")
        for r in results:
            click.echo(f"  {r.name:18} {r.median:.4f} [{r.low:.4f}, {r.high:.4f}]  step {r.step_ms:.2f} ms")
        click.echo(f"  self-measured share {stats.overhead_share:.4f}")
    if summary and (lost := sessions["sampled"].stats().dropped.get("statistics")):
        click.echo(f"statistics of {lost} sites found no place: those steps cost less", err=True)
    if noisy:
        click.echo("too noisy to judge", err=True)
        sys.exit(5)


if __name__ == "__main__":
    main()
