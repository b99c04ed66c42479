"""Where the sites of vLLM's models lie. Its layers return what their MLP adds and, beside it, the stream before that.

So no module returns the residual stream after a layer: the norm that comes next adds both up, and returns the sum
second. After a stage's last layer that norm is on the next stage, which has the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from insitu.sites.catalogue import Catalogue, of_sites
from insitu.sites.site import Site

if TYPE_CHECKING:
    from torch import nn

LAYERS: Final = frozenset(
    {
        ("vllm.model_executor.models.llama", "LlamaDecoderLayer.forward"),
        ("vllm.model_executor.models.qwen2", "Qwen2DecoderLayer.forward"),
        ("vllm.model_executor.models.qwen3", "Qwen3DecoderLayer.forward"),
    }
)
"""Module and name of the forwards whose rows were compared with what transformers computes."""
PLACEHOLDER: Final = "PPMissingLayer"
"""vLLM's class for a layer that another stage has."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers of a model that are here."""

    base: str
    """Path of the module that holds them."""
    layers: tuple[int, ...]
    num_layers: int
    """Of the whole model."""

    @property
    def is_first(self) -> bool:
        return self.layers[0] == 0

    @property
    def is_last(self) -> bool:
        return self.layers[-1] == self.num_layers - 1


def stage_of(model: nn.Module) -> Stage | None:
    """Return the layers of a model that are here, all of them of a known kind; None of any other model."""
    for fqn, module in model.named_modules():
        layers: Any = getattr(module, "layers", None)
        if not fqn or type(layers).__name__ != "ModuleList":
            continue
        here = {at: layer for at, layer in enumerate(layers) if type(layer).__name__ != PLACEHOLDER}
        if here and all(_is_known(layer) for layer in here.values()):
            return Stage(fqn, tuple(here), len(layers))
    return None


def _is_known(layer: nn.Module) -> bool:
    forward = type(layer).forward
    return (forward.__module__, forward.__qualname__) in LAYERS


def catalogue_of(stage: Stage, dtype: str, modules: Mapping[str, nn.Module]) -> Catalogue:
    """Return the sites of a stage. dtype: of the model. modules: its modules by path."""
    return of_sites((site for site in _sites(stage, dtype) if site.fqn in modules), {})


def whole_catalogue(stage: Stage) -> Catalogue:
    """Return the catalogue of all stages together."""
    whole = Stage(stage.base, tuple(range(stage.num_layers)), stage.num_layers)
    return of_sites(_sites(whole, ""), {})


def _sites(stage: Stage, dtype: str) -> Iterator[Site]:
    def site(name: str, path: str, layer: int | None = None, index: int = 0, *, is_default: bool = True) -> Site:
        return Site(0, name, f"{stage.base}.{path}", layer, index=index, dtype=dtype, default=is_default)

    if stage.is_first:
        yield site("embed", "embed_tokens")
    for layer in stage.layers:
        at = f"layers.{layer}"
        if layer:
            yield site(f"L{layer - 1}.resid_post", f"{at}.input_layernorm", layer - 1, 1)
        yield site(f"L{layer}.attn_in", f"{at}.input_layernorm", layer, is_default=False)
        yield site(f"L{layer}.attn_out", f"{at}.self_attn", layer)
        yield site(f"L{layer}.resid_mid", f"{at}.post_attention_layernorm", layer, 1, is_default=False)
        yield site(f"L{layer}.mlp_in", f"{at}.post_attention_layernorm", layer, is_default=False)
        yield site(f"L{layer}.mlp_out", f"{at}.mlp", layer)
    if stage.is_last:
        yield site(f"L{stage.num_layers - 1}.resid_post", "norm", stage.num_layers - 1, 1)
        yield site("final_norm", "norm")
        yield Site(0, "logits", "logits_processor", axis="samples", dtype=dtype)
