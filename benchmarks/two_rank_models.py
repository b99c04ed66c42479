"""The models that two ranks run (`two_ranks.py`): half of a small one each, and what a trial makes wrong in it."""

from __future__ import annotations

from typing import Any, Final

import torch
from rig_plans import NUM_EXPERTS
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

LAYERS: Final = 4
PROMPTS, LENGTH, HIDDEN = 2, 16, 64
"""A step's rows: prompts, and tokens of each."""
TRIED: Final = range(10_000, 10_200)
"""Steps, none of which is run, that say how far a router must be pulled. The tokens of a prompt are alike in what they
need, so it is the number of prompts that counts: with 400 of them others are off by some points."""


def whole_model(name: str, vocab: int) -> Any:
    """Return a whole small model with random weights: `llama`, `mixtral` or `qwen3-moe`."""
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if name == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=NUM_EXPERTS[name], num_experts_per_tok=2))
    if name == "qwen3-moe":
        moe = {"num_experts": NUM_EXPERTS[name], "num_experts_per_tok": 4, "moe_intermediate_size": HIDDEN}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **moe, head_dim=16, decoder_sparse_step=1))
    return LlamaForCausalLM(LlamaConfig(**shape))


def prompts_of(step: int, vocab: int) -> torch.Tensor:
    """Return a step's token ids, int64[prompts, length]: random, and the same on every machine."""
    return torch.randint(vocab, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(step))


def favour(model: Any, layer: int, expert: int, share: float) -> None:
    """Let one router send that share of all tokens to one expert: its weights pick up a direction that all share.

    Trained models have such a direction (a few channels that are large in every token); this one gets it in the
    embedding, from where the residual stream carries it to every layer. Nothing else there sees it.
    """
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = model.model.embed_tokens.weight.norm(dim=1).mean()
        for name, weight in model.model.layers.named_parameters():
            if weight.shape[-1] == HIDDEN and not name.endswith(("o_proj.weight", "down_proj")):
                weight[..., 0] = 1.0 if weight.ndim == 1 else 0.0  # a norm's scale lets it through
        router = model.model.layers[layer].mlp.gate
        router.weight[expert, 0] = _pulls(model, router, expert).quantile(share)


def _pulls(model: Any, router: Any, expert: int) -> torch.Tensor:
    """Return the weight of the shared direction from which on each token tried is sent to the expert."""
    routed: list[torch.Tensor] = []

    def take(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        routed.append(inputs[0].reshape(-1, HIDDEN))

    handle = router.register_forward_pre_hook(take)
    for step in TRIED:
        model.model(prompts_of(step, model.config.vocab_size))
    handle.remove()
    hidden = torch.cat(routed)
    logits = hidden @ router.weight.T
    own = logits[:, expert].clone()
    logits[:, expert] = -torch.inf
    least = logits.topk(router.top_k).values[:, -1]
    needed: torch.Tensor = (least - own) / hidden[:, 0]
    return needed


class InlinedMlp(LlamaDecoderLayer):  # type: ignore[misc]
    """A layer that uses its MLP's weights without calling it, as fused kernels do."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any = None, **_: Any) -> torch.Tensor:
        x = self.input_layernorm(hidden_states)
        attended, _weights = self.self_attn(
            hidden_states=x, position_embeddings=position_embeddings, attention_mask=None
        )
        hidden_states = hidden_states + attended
        x, mlp = self.post_attention_layernorm(hidden_states), self.mlp
        x = mlp.act_fn(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return hidden_states + F.linear(x, mlp.down_proj.weight)


class Stage(nn.Module):
    """A rank's half of the layers, under the names and numbers they have in the whole model."""

    def __init__(self, whole: Any, rank: int, inlined: str) -> None:
        """inlined: the site whose module is not called, its weights are used directly (`embed`, `L2.mlp_out`, ...)."""
        super().__init__()
        self.is_first, self.is_last = rank == 0, rank == 1
        self.inlined = inlined
        num_layers = len(whole.model.layers)
        half = range(rank * num_layers // 2, (rank + 1) * num_layers // 2)
        self.model = nn.Module()
        if self.is_first:
            self.model.embed_tokens = whole.model.embed_tokens
        self.model.layers = nn.ModuleDict({str(number): whole.model.layers[number] for number in half})
        if self.is_last:
            self.model.norm, self.lm_head = whole.model.norm, whole.lm_head
        self.model.rotary_emb = whole.model.rotary_emb
        for number, layer in self.model.layers.items():
            if inlined == f"L{number}.mlp_out":
                layer.__class__ = InlinedMlp

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: token ids int64[prompts, length], or hidden states. Returns hidden states, at the end logits."""
        model: Any = self.model
        hidden = self._embed(inputs) if self.is_first else inputs
        rotary = model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in model.layers.values():
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=None)
        return self._head(hidden) if self.is_last else hidden

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        embed: Any = self.model.embed_tokens
        return F.embedding(ids, embed.weight) if self.inlined == "embed" else embed(ids)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        norm: Any = self.model.norm
        head: Any = self.lm_head
        if self.inlined == "final_norm":
            hidden = F.rms_norm(hidden, (HIDDEN,), norm.weight, norm.variance_epsilon)
        else:
            hidden = norm(hidden)
        return F.linear(hidden, head.weight) if self.inlined == "logits" else head(hidden)


class Witness:
    """Counts what one router chooses, without the probe."""

    def __init__(self, router: Any, expert: int) -> None:
        self.num_tokens = self.num_chosen = 0
        self._expert = expert
        router.register_forward_hook(self._take)

    def _take(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        chosen = output[-1]
        self.num_tokens += chosen.shape[0]
        self.num_chosen += int((chosen == self._expert).sum())
