"""Where the sites of each known architecture lie: data, in one place.

Only places whose rows were compared with what transformers itself computes stand here
(`tests/probe/test_architectures.py`); `docs/probe.md` has the same table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from insitu.families import Family, Place

if TYPE_CHECKING:
    from torch import nn

_PARALLEL: Final = "attention and MLP of such a layer both read what the layer is given, so no sum lies between them"
_EXPERTS: Final = "the experts of such a layer are one fused module, which shows no activations"
_NORMED: Final = "each of its layers ends in a norm of its own"
_ENCODER_ROWS: Final = "its rows are tokens of the encoder, and a step has one row map"
_NOTHING: Final[Mapping[str, str]] = {}


def _layer(*places: Place) -> tuple[Place, ...]:
    return (Place("resid_pre", io="in"), *places, Place("resid_post"))


def _projections(path: str, *children: str) -> tuple[Place, ...]:
    return tuple(Place(name, f"{path}.{child}") for name, child in zip("qkv", children, strict=True))


def _fused(path: str, how: str) -> tuple[Place, ...]:
    return tuple(Place(name, path, fused=how) for name in "qkv")


def _attention(path: str, output: str) -> tuple[Place, ...]:
    """Return the places at the end of an attention block. output: its output projection, from there."""
    return (Place("attn_z", f"{path}.{output}", io="in"), Place("attn_out", path))


def _between(norm: str) -> tuple[Place, ...]:
    """Return the places before and after the norm that stands between attention and MLP."""
    return (Place("resid_mid", norm, io="in"), Place("mlp_in", norm))


def _mlp(output: str) -> tuple[Place, ...]:
    return (Place("mlp_act", f"mlp.{output}", io="in"), Place("mlp_out", "mlp"))


def _router(weights: str) -> tuple[Place, ...]:
    """Return the places of a router that returns (logits, weights, chosen). weights: their dtype; "": the router's."""
    return (
        Place("router_logits", "mlp.gate"),
        Place("router_weights", "mlp.gate", index=1, dtype=weights),
        Place("router_topk", "mlp.gate", index=2, dtype="int64"),
    )


_SEPARATE: Final = _projections("self_attn", "q_proj", "k_proj", "v_proj")
_BEFORE: Final = Place("attn_in", "input_layernorm")
_LLAMA_ATTENTION: Final = (
    _BEFORE,
    *_SEPARATE,
    *_attention("self_attn", "o_proj"),
    *_between("post_attention_layernorm"),
)
_LAST_LAYER_NORM: Final = Place("final_norm", "final_layer_norm")
_CLASSIFIER: Final = Place("logits", "classifier", axis="batch")
_NEOX_ATTENTION: Final = (
    _BEFORE,
    *_fused("attention.query_key_value", "heads"),
    *_attention("attention", "dense"),
)


def _neox(title: str, parallel: bool, *middle: Place, absent: Mapping[str, str] = _NOTHING) -> Family:
    return Family(
        title,
        ("GPTNeoXLayer",),
        _layer(*_NEOX_ATTENTION, *middle, *_mlp("dense_4h_to_h")),
        embed=Place("embed", "embed_in"),
        final_norm=_LAST_LAYER_NORM,
        flag=("use_parallel_residual", parallel),
        absent=absent,
    )


def _opt(
    title: str, norm_before: bool, middle: str, final_norm: Place | None, absent: Mapping[str, str] = _NOTHING
) -> Family:
    """Return OPT layers. middle: the norm that is given the sum after attention."""
    places = _layer(
        Place("attn_in", "self_attn", io="in"),
        *_SEPARATE,
        *_attention("self_attn", "out_proj"),
        Place("resid_mid", middle, io="in"),
        Place("mlp_in", "fc1", io="in"),
        Place("mlp_act", "fc2", io="in"),
        Place("mlp_out", "fc2"),
    )
    return Family(
        title,
        ("OPTDecoderLayer",),
        places,
        embed=Place("embed", "layers.0", io="in"),
        final_norm=final_norm,
        flag=("do_layer_norm_before", norm_before),
        absent=absent,
    )


def _t5(title: str, decoder: bool, mlp: str, *cross: Place, absent: Mapping[str, str] = _NOTHING) -> Family:
    """Return T5 layers. mlp: the sublayer of the MLP."""
    places = _layer(
        Place("attn_in", "layer.0.layer_norm"),
        *_projections("layer.0.SelfAttention", "q", "k", "v"),
        *_attention("layer.0.SelfAttention", "o"),
        Place("resid_mid", "layer.1", io="in"),
        *cross,
        Place("mlp_in", f"{mlp}.layer_norm"),
        Place("mlp_act", f"{mlp}.DenseReluDense.wo", io="in"),
        Place("mlp_out", f"{mlp}.DenseReluDense"),
    )
    flag = ("is_decoder", decoder)
    return Family(
        title, ("T5Block", "MT5Block"), places, "block", final_norm=_LAST_LAYER_NORM, flag=flag, absent=absent
    )


FAMILIES: Final = (
    Family(
        "Llama, Mistral, Qwen2, Qwen3, Gemma",
        ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GemmaDecoderLayer"),
        _layer(*_LLAMA_ATTENTION, *_mlp("down_proj")),
    ),
    Family(
        "Mixtral",
        ("MixtralDecoderLayer",),
        _layer(*_LLAMA_ATTENTION, *_router("float32"), Place("mlp_out", "mlp")),
        absent={"mlp_act": _EXPERTS},
    ),
    Family(
        "Qwen2-MoE, Qwen3-MoE",
        ("Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer"),
        _layer(*_LLAMA_ATTENTION, *_router(""), *_mlp("down_proj")),
        absent={"mlp_act": _EXPERTS},
    ),
    Family(
        "Phi-3",
        ("Phi3DecoderLayer",),
        _layer(
            _BEFORE,
            *_fused("self_attn.qkv_proj", "blocks"),
            *_attention("self_attn", "o_proj"),
            *_between("post_attention_layernorm"),
            *_mlp("down_proj"),
        ),
    ),
    Family(
        "Gemma 2, Gemma 3",
        ("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
        _layer(
            _BEFORE,
            *_SEPARATE,
            Place("attn_z", "self_attn.o_proj", io="in"),
            Place("attn_out", "post_attention_layernorm"),
            *_between("pre_feedforward_layernorm"),
            Place("mlp_act", "mlp.down_proj", io="in"),
            Place("mlp_out", "post_feedforward_layernorm"),
        ),
    ),
    Family(
        "Phi-1, Phi-2",
        ("PhiDecoderLayer",),
        _layer(_BEFORE, *_SEPARATE, *_attention("self_attn", "dense"), Place("mlp_in", "mlp", io="in"), *_mlp("fc2")),
        final_norm=Place("final_norm", "final_layernorm"),
        absent={"resid_mid": _PARALLEL},
    ),
    _neox(
        "GPT-NeoX, parallel",
        True,
        Place("mlp_in", "post_attention_layernorm"),
        absent={"resid_mid": _PARALLEL},
    ),
    _neox("GPT-NeoX, sequential", False, *_between("post_attention_layernorm")),
    Family(
        "GPT-2",
        ("GPT2Block",),
        _layer(
            Place("attn_in", "ln_1"),
            *_fused("attn.c_attn", "blocks"),
            *_attention("attn", "c_proj"),
            *_between("ln_2"),
            *_mlp("c_proj"),
        ),
        "h",
        embed=Place("embed", "drop"),
        final_norm=Place("final_norm", "ln_f"),
        without=("crossattention",),
    ),
    _opt("OPT", True, "final_layer_norm", _LAST_LAYER_NORM),
    _opt("OPT-350m", False, "self_attn_layer_norm", None, absent={"final_norm": _NORMED}),
    Family(
        "BERT, RoBERTa",
        ("BertLayer", "RobertaLayer"),
        _layer(
            Place("attn_in", "attention", io="in"),
            *_projections("attention.self", "query", "key", "value"),
            Place("attn_z", "attention.output.dense", io="in"),
            Place("attn_out", "attention.output.dense"),
            Place("resid_mid", "attention.output.LayerNorm", io="in"),
            Place("mlp_in", "intermediate", io="in"),
            Place("mlp_act", "output.dense", io="in"),
            Place("mlp_out", "output.dense"),
        ),
        "encoder.layer",
        embed=Place("embed", "embeddings"),
        final_norm=None,
        logits=(Place("logits", "cls"), Place("logits", "lm_head"), _CLASSIFIER),
        without=("crossattention",),
        absent={"final_norm": _NORMED},
    ),
    Family(
        "ModernBERT",
        ("ModernBertEncoderLayer",),
        _layer(
            Place("attn_in", "attn_norm"),
            *_fused("attn.Wqkv", "blocks"),
            *_attention("attn", "Wo"),
            *_between("mlp_norm"),
            *_mlp("Wo"),
        ),
        embed=Place("embed", "embeddings"),
        final_norm=Place("final_norm", "final_norm"),
        logits=(Place("logits", "decoder"), _CLASSIFIER),
    ),
    Family(
        "ViT",
        ("ViTLayer",),
        _layer(
            Place("attn_in", "layernorm_before"),
            *_projections("attention", "q_proj", "k_proj", "v_proj"),
            *_attention("attention", "o_proj"),
            *_between("layernorm_after"),
            *_mlp("fc2"),
        ),
        embed=Place("embed", "embeddings"),
        final_norm=Place("final_norm", "layernorm"),
        logits=(_CLASSIFIER,),
    ),
    _t5("T5, mT5: encoder", False, "layer.1"),
    _t5(
        "T5, mT5: decoder",
        True,
        "layer.2",
        Place("cross_in", "layer.1.layer_norm"),
        Place("cross_q", "layer.1.EncDecAttention.q"),
        Place("cross_z", "layer.1.EncDecAttention.o", io="in"),
        Place("cross_out", "layer.1.EncDecAttention"),
        Place("resid_cross", "layer.2", io="in"),
        absent={"cross_k": _ENCODER_ROWS, "cross_v": _ENCODER_ROWS},
    ),
)
"""The first family that holds a layer is the layer's."""


def family_of(module: nn.Module, families: Sequence[Family] = FAMILIES) -> Family | None:
    """Return the family of a layer; None for any other module."""
    return next((family for family in families if family.holds(module)), None)
