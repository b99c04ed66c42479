"""One pipeline stage: a contiguous range of a Hugging Face decoder's layers, and nothing of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from insitu_engine.attention import PagedStep, paged_step
from insitu_engine.checkpoint import Checkpoint, meta_model, read_weights
from insitu_engine.kv_cache import KvCache
from insitu_engine.messages import RowPlan, Sampling, StepPlan


@dataclass(slots=True)
class StepInputs:
    """A step as tensors: what every stage makes for itself from the plan."""

    tokens: torch.Tensor
    """int64 [num_rows]"""
    positions: torch.Tensor
    """int64 [1, num_rows]"""
    sample_rows: torch.Tensor
    """int64 [num_samples]: the rows whose logits are wanted, in order of `sample_row`."""
    paged: PagedStep


class Stage(nn.Module):
    """Layers `layers` of a model; the embedding on the first stage, final norm and lm_head on the last.

    Modules keep the names and the global layer indices of the whole model (`model.layers.5.mlp`).
    """

    def __init__(self, checkpoint: Checkpoint, layers: range) -> None:
        super().__init__()
        whole = meta_model(checkpoint.config)
        self.layer_range = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == checkpoint.num_layers
        self.model = nn.Module()
        if self.is_first:
            self.model.embed_tokens = whole.model.embed_tokens
        self.model.layers = nn.ModuleDict({str(index): whole.model.layers[index] for index in layers})
        if self.is_last:
            self.model.norm = whole.model.norm
            self.lm_head = whole.lm_head
        # Its buffers are computed, not stored: built anew, off the meta device.
        self.model.rotary_emb = type(whole.model.rotary_emb)(config=checkpoint.config)

    def load(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        """Read this stage's weights and place them on the device."""
        tied_here = checkpoint.tied and self.is_first and self.is_last
        names = [name for name, _ in self.named_parameters(remove_duplicate=False)]
        if tied_here:
            names.remove("lm_head.weight")
        weights = read_weights(checkpoint, iter(names), dtype)
        if tied_here:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self.load_state_dict(weights, assign=True)
        if tied_here:
            self.lm_head.weight = self.model.embed_tokens.weight  # type: ignore[union-attr]
        self.requires_grad_(False)
        self.eval()
        self.to(device)

    def forward(self, inputs: torch.Tensor, step: StepInputs) -> torch.Tensor:
        """Run the layers over one step.

        inputs: token ids int64 [num_rows] on the first stage, hidden states [num_rows, hidden] on the others.
        Returns hidden states [num_rows, hidden]; on the last stage logits [num_samples, vocab].
        """
        model: Any = self.model
        hidden: torch.Tensor = model.embed_tokens(inputs[None]) if self.is_first else inputs[None]
        rotary = model.rotary_emb(hidden, step.positions)
        for layer in model.layers.values():
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=step.positions,
                position_embeddings=rotary,
                paged=step.paged,
            )
        hidden = hidden[0]
        if not self.is_last:
            return hidden
        sampled = hidden.index_select(0, step.sample_rows)
        # Without a sampled row the head has nothing to do.
        return self.lm_head(model.norm(sampled)) if len(sampled) else sampled


def step_inputs(plan: StepPlan, cache: KvCache, device: torch.device) -> StepInputs:
    """Return a plan as tensors on the device."""
    tokens: list[int] = []
    positions: list[int] = []
    samples: list[int] = []
    for row in plan.rows:
        tokens += row.tokens
        positions += range(row.position, row.position + row.count)
        if row.sample_row >= 0:
            samples.append(row.start + row.count - 1)
    return StepInputs(
        tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device)[None],
        sample_rows=torch.tensor(samples, dtype=torch.int64, device=device),
        paged=paged_step(cache, plan.rows, plan.num_rows, device),
    )


def heat(stage: Stage, cache: KvCache, hidden_size: int, device: torch.device) -> None:
    """Run two forward passes nobody sees, so that the first real step finds its kernels loaded."""
    rows = [RowPlan("heat", 0, 8, 0, "prefill", 0, False, [1], [0] * 8, Sampling())]
    dtype = next(stage.parameters()).dtype
    for count in (8, 1):
        row = rows[0]
        row.count, row.tokens = count, [0] * count
        plan = StepPlan(0, 0, "prefill", count, 1, rows, [])
        inputs = step_inputs(plan, cache, device)
        hidden = torch.zeros((count, hidden_size), dtype=dtype, device=device)
        stage(inputs.tokens if stage.is_first else hidden, inputs)
    cache.scrub([1])
