"""Which models the engine runs as they are meant to run, and why it refuses the others."""

from __future__ import annotations

from typing import Any, Final

from insitu_engine.errors import EngineError

VERIFIED: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose output is tested against transformers, token for token."""


def check(config: Any) -> None:
    """Raise EngineError, in one line that names what is missing, for a model the engine cannot run."""
    missing = _missing(config)
    if missing:
        raise EngineError(
            f"architecture {config.model_type!r} is not supported: {missing}; supported are {', '.join(VERIFIED)}"
        )


def _missing(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder, and the engine runs decoders only"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised, and the engine loads plain floating point only"
    if config.model_type in VERIFIED:
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope in ("dynamic", "longrope"):
            return f"its rotary embedding ({rope}) changes with the length of a request, and a batch has many lengths"
        return None
    if hasattr(config, "kv_lora_rank"):
        return "it caches a latent instead of one key and value a layer"
    if any(hasattr(config, name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "its layers route tokens to experts"
    if any(hasattr(config, name) for name in ("ssm_cfg", "state_size", "mamba_d_state", "linear_num_key_heads")):
        return "it keeps a recurrent state instead of one key and value a layer"
    if not hasattr(config, "rope_parameters"):
        return "its positions are not rotary, and the engine hands its layers rotary embeddings"
    return "its forward pass has not been verified against transformers"
