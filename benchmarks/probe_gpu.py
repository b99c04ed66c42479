"""The same question on a device: a Llama of the shape of an 8B, its step in a CUDA graph, with T0 and without.

The step reads no KV cache, so that it is as short as such a step can be and what is added to it counts most. Where
there is no device, that is said.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import torch
from interleaving import interleaved
from llamas import twin
from overhead_figures import Ratio, Target, paired
from transformers import LlamaConfig, LlamaForCausalLM
from variant_names import AGAIN, DETACHED, T0

import insitu
from insitu.testing import Recording

BATCHES: Final = (1, 16, 64)
ROUNDS: Final = 500
ROUNDS_A_FLUSH: Final = 50
TARGET: Final = 1.005
SHAPE: Final = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
"""8.0 billion parameters, random: 16 GB in bfloat16, which the three variants share."""


def measure_on_cuda(seed: int) -> dict[str, Any]:
    """Return ratios by batch, and the lines that say them."""
    if not torch.cuda.is_available():
        why = "no CUDA device here: the Llama of the shape of an 8B, its step in a CUDA graph, was not run"
        return {"skipped": why, "lines": [why]}
    with torch.inference_mode():
        model = build()
        found = {batch: graphs(model, batch, seed) for batch in BATCHES}
    lines = [f"{torch.cuda.get_device_name()}: an 8B-shaped Llama in bfloat16, its step in a CUDA graph; over detached"]
    for batch, (step_ms, ratios, same) in found.items():
        lines.append(f"  batch {batch}: {step_ms:.3f} ms, logits {'the same bits' if same else 'of OTHER bits'}")
        for ratio in ratios:
            told = f"  target <= {TARGET}: {Target(TARGET).verdict(ratio)}" if ratio.name == T0 else ""
            lines.append(f"    {ratio.name:24} {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]{told}")
    told_of = {
        str(batch): {"step_ms": step_ms, "ratios": [asdict(ratio) for ratio in ratios], "same_bits": same}
        for batch, (step_ms, ratios, same) in found.items()
    }
    return {"device": torch.cuda.get_device_name(), "batches": told_of, "lines": lines}


def build(config: LlamaConfig = SHAPE) -> Any:
    """Return the model on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def captured(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return a CUDA graph of one forward, and its logits. The forward before it warms up, and tells of sites."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(input_ids=ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = model(input_ids=ids, use_cache=False).logits
    return graph, logits


def graphs(model: Any, batch: int, seed: int, rounds: int = ROUNDS) -> tuple[float, list[Ratio], bool]:
    """Return the detached step in ms, ratios over it, and whether all variants gave the same bits."""
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")
    probed = twin(model)
    session = insitu.attach(probed, to=Recording(), max_rows=max(64, batch))
    try:
        (bare, logits), (again, _), (tapped, seen) = (captured(each, ids) for each in (model, twin(model), probed))
        rows = [insitu.Rows(f"r{i}", i, 1) for i in range(batch)]

        def replay(graph: Any) -> Callable[[], None]:
            def run() -> None:
                graph.replay()
                torch.cuda.synchronize()

            return run

        def step() -> None:
            with session.step(rows=rows, phase="decode"):
                tapped.replay()
            torch.cuda.synchronize()

        ways = {DETACHED: replay(bare), AGAIN: replay(again), T0: step}
        wall: dict[str, list[float]] = {name: [] for name in ways}
        order = random.Random(seed)
        for _ in range(0, rounds, ROUNDS_A_FLUSH):
            part, _ = interleaved(ways, ROUNDS_A_FLUSH, order, warm_up=2)
            for name, values in part.items():
                wall[name] += values.tolist()
            session.flush()
        same = torch.equal(logits, seen)
    finally:
        session.close()
    ratios = [paired(name, wall[DETACHED], wall[name], seed) for name in (AGAIN, T0)]
    return sorted(wall[DETACHED])[len(wall[DETACHED]) // 2] * 1e3, ratios, same
