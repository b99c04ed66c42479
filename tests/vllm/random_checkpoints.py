"""Small models of other architectures with random weights, whose heads two ranks can share; made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

NUM_LAYERS: Final = 3
SHAPE: Final = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


FURTHER: Final = {
    "OPT": {"ffn_dim": SHAPE["intermediate_size"], "word_embed_proj_dim": SHAPE["hidden_size"]},
    "Qwen2Moe": {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def make(architecture: str, folder: Path) -> Path:
    """Write a model of "Qwen2", "Qwen3", "Qwen2Moe" or "OPT" into a folder, and return it."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**SHAPE, **FURTHER.get(architecture, {}))
    torch.manual_seed(3)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for weight in model.parameters():  # larger than at the beginning of training, so that the layers tell
        weight.data.mul_(3) if weight.ndim > 1 else None
    model.save_pretrained(folder)
    return folder
