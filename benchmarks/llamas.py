"""The models that costs are measured on, and what their layers hold. Imports nothing of insitu: peers have it not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

TINY: Final = Path(__file__).resolve().parents[1] / "examples" / "models" / "tiny-llama"
LARGE: Final = LlamaConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=24,
    num_key_value_heads=12,
    vocab_size=8192,
)
"""119 M parameters. The vocabulary is small so that the layers are what a step is made of."""
SMALL: Final = LlamaConfig(
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=8,
    num_attention_heads=8,
    vocab_size=2048,
)
"""7.4 M parameters, about as long a step as that of the shipped checkpoint takes."""
LEAST: Final = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)
"""For the tests of benchmarks: a step of a millisecond says nothing about cost."""
RANDOM: Final = {"100m": LARGE, "small": SMALL, "least": LEAST}
NAMES: Final = ("tiny", *RANDOM)


def build(name: str, seed: int = 0) -> Any:
    """Return the model called "tiny" (the shipped checkpoint), or one with random weights, in float32."""
    disable_progress_bar()
    if name == "tiny":
        return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    return LlamaForCausalLM(RANDOM[name]).eval()


def twin(model: Any) -> Any:
    """Return a copy with modules of its own and the same weights in memory, so that caches treat both alike."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def states_of(model: Any, ids: torch.Tensor) -> list[NDArray[np.float32]]:
    """Return what each layer hands on, [tokens, width] in order of the layers, by plain hooks on a copy."""
    found: list[NDArray[np.float32]] = []
    plain = twin(model)
    for layer in plain.model.layers:
        layer.register_forward_hook(lambda module, given, output: found.append(flat(output)))
    plain(input_ids=ids, use_cache=False)
    return found


def flat(output: Any) -> NDArray[np.float32]:
    """Return what a layer returned as [tokens, width] on the host; a copy."""
    x = output if isinstance(output, torch.Tensor) else output[0]
    rows: NDArray[np.float32] = x.detach().reshape(-1, x.shape[-1]).float().cpu().numpy().copy()
    return rows
