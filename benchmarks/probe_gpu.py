"""The same question on a device: a Llama of the shape of an 8B, with T0 and without, in a CUDA graph and eager.

The step reads no KV cache, so that it is as short as such a step can be and what is added to it counts most. Where
there is no device, that is said.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch
from interleaving import interleaved
from llamas import twin
from overhead_figures import Ratio, Target, paired
from transformers import LlamaConfig, LlamaForCausalLM
from variant_names import AGAIN, BOUNDARY, DETACHED, T0

import insitu
from insitu.session.live import Session
from insitu.testing import Recording

BATCHES: Final = (1, 16, 64)
ROUNDS: Final = 500
ROUNDS_OF_EAGER: Final = 200
ROUNDS_A_FLUSH: Final = 50
T0_BY_TORCH: Final = "T0 by torch's operations"
TARGET: Final = 1.005
SHAPE: Final = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
"""8.0 billion parameters, random: 16 GB in bfloat16, which all variants share."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What steps of one kind took."""

    mode: str
    batch: int
    step_ms: float
    """Detached, the median."""
    ratios: list[Ratio]
    same_bits: bool
    """Whether logits are the same with taps and without."""

    @classmethod
    def of(cls, mode: str, batch: int, wall: Mapping[str, list[float]], seed: int, *, same_bits: bool) -> Steps:
        ratios = [paired(name, wall[DETACHED], values, seed) for name, values in wall.items() if name != DETACHED]
        return cls(mode, batch, statistics.median(wall[DETACHED]) * 1e3, ratios, same_bits)


def measure_on_cuda(seed: int) -> dict[str, Any]:
    """Return ratios by batch, and the lines that say them."""
    if not torch.cuda.is_available():
        why = "no CUDA device here: the Llama of the shape of an 8B, its step in a CUDA graph, was not run"
        return {"skipped": why, "lines": [why]}
    with torch.inference_mode():
        model = build()
        found = [way(model, batch, seed) for way in (graphs, eager) for batch in BATCHES]
    name = torch.cuda.get_device_name()
    lines = [f"{name}: an 8B-shaped Llama in bfloat16; over detached, whose step takes the milliseconds told"]
    for one in found:
        lines.append(f"  {one.mode}, batch {one.batch}: {one.step_ms:.3f} ms, {_told_of_bits(one)}")
        for ratio in one.ratios:
            told = f"  target <= {TARGET}: {Target(TARGET).verdict(ratio)}" if ratio.name == T0 else ""
            lines.append(f"    {ratio.name:24} {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]{told}")
    return {"device": name, "steps": [asdict(one) for one in found], "lines": lines}


def _told_of_bits(one: Steps) -> str:
    return "logits the same bits" if one.same_bits else "logits of OTHER bits"


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


def graphs(model: Any, batch: int, seed: int, rounds: int = ROUNDS) -> Steps:
    """Measure a step that is one replay of a CUDA graph."""
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")
    (bare, logits), (again, _) = (captured(each, ids) for each in (model, twin(model)))
    ways, same = {DETACHED: _alone(bare.replay), AGAIN: _alone(again.replay)}, True
    with ExitStack() as stack:
        sessions = []
        for name, sites in ((BOUNDARY, "boundary"), (T0, "all")):
            probed = twin(model)
            attached = insitu.attach(probed, to=Recording(), max_rows=max(64, batch), t0=sites)
            sessions.append(stack.enter_context(closing(attached)))
            graph, seen = captured(probed, ids)
            ways[name] = _in_step(attached, batch, graph.replay)
            same &= torch.equal(logits, seen)
        wall = _measured(ways, rounds, seed, lambda: [session.flush() for session in sessions])
    return Steps.of("in a CUDA graph", batch, wall, seed, same_bits=same)


def eager(model: Any, batch: int, seed: int, rounds: int = ROUNDS_OF_EAGER) -> Steps:
    """Measure a step of which each kernel is launched by the host: taps by kernels, and by torch's operations."""
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device="cuda")
    models = {name: twin(model) for name in (AGAIN, T0, T0_BY_TORCH)}
    with ExitStack() as stack:
        sessions = {}
        for name in (T0, T0_BY_TORCH):
            os.environ["INSITU_FUSED_TAPS"] = str(int(name == T0))
            attached = insitu.attach(models[name], to=Recording(), max_rows=max(64, batch))
            sessions[name] = stack.enter_context(closing(attached))
        del os.environ["INSITU_FUSED_TAPS"]
        calls = {name: partial(each, input_ids=ids, use_cache=False) for name, each in models.items()}
        bare = partial(model, input_ids=ids, use_cache=False)
        ways = {DETACHED: _alone(bare), AGAIN: _alone(calls[AGAIN])}
        ways |= {name: _in_step(session, batch, calls[name]) for name, session in sessions.items()}
        wall = _measured(ways, rounds, seed, lambda: [session.flush() for session in sessions.values()])
        assert [each.coverage().taps for each in sessions.values()] == ["triton", "torch"], "not what is to be compared"
        same = torch.equal(bare().logits, calls[T0]().logits)
        return Steps.of("eager", batch, wall, seed, same_bits=same)


def _alone(call: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def _in_step(session: Session, batch: int, call: Callable[[], Any]) -> Callable[[], None]:
    rows = [insitu.Rows(f"r{i}", i, 1) for i in range(batch)]

    def run() -> None:
        with session.step(rows=rows, phase="decode"):
            call()
        torch.cuda.synchronize()

    return run


def _measured(
    ways: Mapping[str, Callable[[], None]], rounds: int, seed: int, flush: Callable[[], Any]
) -> dict[str, list[float]]:
    """Return seconds by way and round."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(seed)
    for _ in range(0, rounds, ROUNDS_A_FLUSH):
        part, _ = interleaved(ways, ROUNDS_A_FLUSH, order, warm_up=2)
        for name, values in part.items():
            wall[name] += values.tolist()
        flush()
    return wall
