"""The rows of all layers by libraries that look into models, each as its own documentation says it is fastest."""

from __future__ import annotations

from typing import Any

import torch
from probe_variants import Bench, ByHand
from row_files import SAFETENSORS


class Nnsight(ByHand):
    """nnsight: one trace a step, warmed up, and a cache of the layers: cheaper than a `save` of each."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, "nnsight", SAFETENSORS, on_thread=True)

    def prepared(self, model: Any) -> Any:
        from nnsight import NNsight

        wrapped = NNsight(model)
        self._layers = list(wrapped.model.layers)
        return wrapped

    def forward(self, ids: torch.Tensor) -> None:
        with self.run.trace(input_ids=ids, use_cache=False) as tracer:
            cache = tracer.cache(modules=self._layers)
        states = [cache[layer.path].output for layer in self._layers]
        self.now = [x if isinstance(x, torch.Tensor) else x[0] for x in states]


class Lens(ByHand):
    """TransformerLens: a bridge around the same model, caching hooks put on once, and no logits returned.

    It computes attention in its own way, so that sums are rounded otherwise.
    """

    needs_bits = False

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench, "lens", SAFETENSORS, on_thread=True)

    def prepared(self, model: Any) -> Any:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
        self._names = [f"blocks.{number}.hook_out" for number in range(self.bench.num_layers)]
        self._cache = bridge.add_caching_hooks(self._names)
        return bridge

    def forward(self, ids: torch.Tensor) -> None:
        self.run(ids, return_type=None, use_cache=False)
        self.now = [self._cache[name] for name in self._names]
        self._cache.clear()
