"""Which models can be followed, and what is different about their sites. Imports nothing of transformers."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn


def can_generate(model: nn.Module) -> bool:
    """Tell whether a model generates by itself."""
    generation = sys.modules.get("transformers.generation.utils")
    return generation is not None and isinstance(model, generation.GenerationMixin)


def axes_of(model: nn.Module) -> Mapping[str, str]:
    """Return on which axis its logits lie, by name and by path: it makes them of the tokens that it samples from."""
    if not can_generate(model):
        return {}
    head = model.get_output_embeddings()  # type: ignore[operator]
    paths = [path for path, module in model.named_modules() if module is head]
    return dict.fromkeys(("logits", *paths), "samples")
