"""A small model of each class of layers that the table of architectures has, and what lies between its places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import transformers as hf
from torch import nn

LAYERS: Final = 3
HEADS, HEAD, KV = 4, 8, 2
WIDTH: Final = HEADS * HEAD

DECODER: Final = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GEMMA: Final = {**DECODER, "head_dim": HEAD, "query_pre_attn_scalar": HEAD}
QWEN_MOE: Final = {
    **DECODER,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "experts_implementation": "eager",
}
OPT: Final = {
    **{name: DECODER[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "ffn_dim": 48,
    "max_position_embeddings": 32,
}
T5: Final = {
    "vocab_size": 64,
    "d_model": WIDTH,
    "d_kv": HEAD,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
IDS: Final = {"input_ids": torch.tensor([[5, 9, 3, 17, 60], [8, 8, 41, 2, 30]])}
DECODED: Final = {**IDS, "decoder_input_ids": torch.tensor([[4, 11, 12], [50, 7, 33]])}


@dataclass(frozen=True)
class Case:
    """A class of layers: a small model of it, and what is between its places."""

    layer: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, torch.Tensor] = field(default_factory=lambda: IDS)
    attn_norm: tuple[str, ...] = ("input_layernorm",)
    """From what a layer is given to what attention projects."""
    attn_after: tuple[str, ...] = ()
    """From attention's output projection to what is added."""
    mlp_norm: tuple[str, ...] = ("post_attention_layernorm",)
    """From the residual stream to what the MLP is given."""
    mlp_after: tuple[str, ...] = ()
    end_norm: tuple[str, ...] = ()
    """From the last sum to what the layer returns."""
    tied: bool = True
    """transformers puts the last hidden state, after the final norm, in the place of what the last layer returned."""
    tail: tuple[str, ...] = ()
    """From the last layer to the last hidden state, where there is no final norm."""
    rotated: bool = True
    """Queries and keys are rotated by position before they reach the attention function."""
    scale: float = 1.0
    """What queries are multiplied by before they reach the attention function."""
    absent: frozenset[str] = frozenset()


def causal(kind: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**{**DECODER, **more}))
        return model

    return make


def built(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        found: nn.Module = getattr(hf, model)(getattr(hf, config)(**fields))
        return found

    return make


SANDWICH: Final[dict[str, Any]] = {
    "attn_after": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp_after": ("post_feedforward_layernorm",),
}
PARALLEL: Final = frozenset({"resid_mid"})
ENCODER: Final = {name: DECODER[name] for name in DECODER if name != "num_key_value_heads"}
BERT: Final[dict[str, Any]] = {
    "attn_norm": (),
    "mlp_norm": ("attention.output.LayerNorm",),
    "end_norm": ("output.LayerNorm",),
    "rotated": False,
    "absent": frozenset({"final_norm"}),
}
CASES: Final = (
    Case("LlamaDecoderLayer", causal("Llama")),
    Case("MistralDecoderLayer", causal("Mistral")),
    Case("Qwen2DecoderLayer", causal("Qwen2")),
    Case("Qwen3DecoderLayer", causal("Qwen3", head_dim=HEAD)),
    Case("GemmaDecoderLayer", causal("Gemma", head_dim=HEAD)),
    Case(
        "MixtralDecoderLayer",
        causal("Mixtral", num_local_experts=5, experts_implementation="eager"),
        absent=frozenset({"mlp_act"}),
    ),
    Case("Qwen2MoeDecoderLayer", built("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **QWEN_MOE)),
    Case("Qwen3MoeDecoderLayer", built("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **QWEN_MOE, head_dim=HEAD)),
    Case("Phi3DecoderLayer", causal("Phi3")),
    Case("Gemma2DecoderLayer", built("Gemma2ForCausalLM", "Gemma2Config", **GEMMA), **SANDWICH),
    Case("Gemma3DecoderLayer", built("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA), **SANDWICH),
    Case("PhiDecoderLayer", causal("Phi"), mlp_norm=("input_layernorm",), absent=PARALLEL),
    Case("GPTNeoXLayer", causal("GPTNeoX", use_parallel_residual=True), absent=PARALLEL),
    Case("GPTNeoXLayer", causal("GPTNeoX", use_parallel_residual=False)),
    Case(
        "GPT2Block",
        built(
            "GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=64, n_positions=32
        ),
        attn_norm=("ln_1",),
        mlp_norm=("ln_2",),
        rotated=False,
    ),
    Case(
        "OPTDecoderLayer",
        built("OPTForCausalLM", "OPTConfig", **OPT, word_embed_proj_dim=WIDTH),
        attn_norm=("self_attn_layer_norm",),
        mlp_norm=("final_layer_norm",),
        rotated=False,
        scale=HEAD**-0.5,
    ),
    Case(
        "OPTDecoderLayer",
        built("OPTForCausalLM", "OPTConfig", **OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
        attn_norm=(),
        mlp_norm=("self_attn_layer_norm",),
        end_norm=("final_layer_norm",),
        tail=("model.decoder.project_out",),
        rotated=False,
        scale=HEAD**-0.5,
        absent=frozenset({"final_norm"}),
    ),
    Case("BertLayer", built("BertForMaskedLM", "BertConfig", **ENCODER), **BERT),
    Case("RobertaLayer", built("RobertaForMaskedLM", "RobertaConfig", **ENCODER), **BERT),
    Case(
        "ModernBertEncoderLayer",
        built("ModernBertForMaskedLM", "ModernBertConfig", **ENCODER, local_attention=4),
        attn_norm=("attn_norm",),
        mlp_norm=("mlp_norm",),
    ),
    Case(
        "ViTLayer",
        built("ViTForImageClassification", "ViTConfig", **{**ENCODER, "image_size": 8, "patch_size": 4}),
        inputs={"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).reshape(2, 3, 8, 8)},
        attn_norm=("layernorm_before",),
        mlp_norm=("layernorm_after",),
        tied=False,
        rotated=False,
    ),
    *(
        Case(
            f"{kind}Block",
            built(f"{kind}ForConditionalGeneration", f"{kind}Config", **T5),
            inputs=DECODED,
            attn_norm=("layer.0.layer_norm",),
            mlp_norm=("layer.-1.layer_norm",),
            rotated=False,
            absent=frozenset({"cross_k", "cross_v"}),
        )
        for kind in ("T5", "MT5")
    ),
)


def random_model(case: Case, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    model = case.make().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model
