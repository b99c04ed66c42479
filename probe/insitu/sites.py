"""Where a model can be observed: named sites, resolved once at attach."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from insitu.rules import matches

if TYPE_CHECKING:
    from torch import nn

MAX_MODULE_SITES: Final = 256
"""A model of unknown shape gets at most this many sites, outermost first: each costs one reduction a step."""


@dataclass(frozen=True, slots=True)
class Site:
    """A named place in a model. `number` is its column in every slab, in order of execution."""

    number: int
    name: str
    fqn: str
    layer: int | None = None
    io: str = "out"
    index: int = 0
    """Which element, where the module returns a tuple."""
    shard: str = "replicated"
    axis: str = "tokens"
    num_experts: int = 0
    """Of a router: how many experts it chooses from; what it chose is its last output, int64[tokens, top_k]."""
    boundary: bool = False
    """Per-row sum and absmax are taken in every step: the stage's last layer and last site, and logits."""


class SiteError(ValueError):
    """A requested site resolves nowhere; the message names the nearest."""


_LAYERS: Final = re.compile(
    r"^(?:(?:model|transformer|bert|roberta|gpt_neox)\.)?(?:encoder\.)?(?:layers|h|layer)\.(\d+)$"
)
_IN_LAYER: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("attn_out", ("self_attn", "attn", "attention", "self_attention")),
    ("router_logits", ("mlp.gate", "mlp.router", "block_sparse_moe.gate")),
    ("mlp_out", ("mlp", "block_sparse_moe", "feed_forward", "output")),
)
_OUTSIDE: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    (
        "embed",
        ("model.embed_tokens", "transformer.drop", "embeddings", "bert.embeddings", "roberta.embeddings"),
    ),
    ("final_norm", ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm")),
    ("logits", ("lm_head", "embed_out", "cls", "classifier")),
)


def resolve(model: nn.Module, axes: Mapping[str, str] | None = None) -> tuple[Site, ...]:
    """Return the sites of a model in order of execution.

    Llama/Qwen/Mistral/GPT-2/Mixtral/BERT-style decoders and encoders get canonical names (`embed`, `L3.attn_out`,
    `L3.mlp_out`, `L3.resid_post`, `final_norm`, `logits`); for any other module its paths are the names, children
    before parents, and `output` is the model's own. `axes` maps site globs to "tokens", "samples" or "batch".
    """
    modules = dict(model.named_modules())
    layers = {fqn: int(found[1]) for fqn in modules if (found := _LAYERS.match(fqn))}
    sites = list(_canonical(modules, layers) if layers else _by_path(model))
    numbered = [replace(site, number=number) for number, site in enumerate(sites)]
    return tuple(_with_axis(site, axes or {}) for site in _with_boundary(numbered))


def _canonical(modules: Mapping[str, nn.Module], layers: Mapping[str, int]) -> Iterator[Site]:
    for name, fqns in _OUTSIDE[:1]:
        yield from (Site(0, name, fqn) for fqn in fqns if fqn in modules)
    for fqn, layer in sorted(layers.items(), key=lambda item: item[1]):
        for name, children in _IN_LAYER:
            found = [f"{fqn}.{child}" for child in children if f"{fqn}.{child}" in modules]
            yield from (
                Site(0, f"L{layer}.{name}", child, layer, num_experts=_num_experts(name, modules[child]))
                for child in found[:1]
                if name != "router_logits" or _num_experts(name, modules[child])
            )
        yield Site(0, f"L{layer}.resid_post", fqn, layer)
    for name, fqns in _OUTSIDE[1:]:
        yield from (Site(0, name, fqn) for fqn in fqns if fqn in modules)


def _num_experts(name: str, module: nn.Module) -> int:
    """Return how many experts a router has; 0 for what is none, such as the gate of a plain feed-forward layer."""
    counts = (getattr(module, "num_experts", 0), getattr(module, "top_k", 0)) if name == "router_logits" else (0, 0)
    return counts[0] if all(isinstance(count, int) and count > 0 for count in counts) else 0


def _by_path(model: nn.Module) -> Iterator[Site]:
    paths = [fqn for fqn, module in model.named_modules() if fqn and _can_be_called(module)]
    kept = set(sorted(paths, key=lambda fqn: fqn.count("."))[:MAX_MODULE_SITES])
    for fqn in _children_first(model, ""):
        if fqn in kept:
            yield Site(0, fqn, fqn, axis="batch")
    yield Site(0, "output", "", axis="batch")


def _can_be_called(module: nn.Module) -> bool:
    """Tell whether a module has a forward; a list or dict of modules has none, and would be a site that never fires."""
    return getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


def _children_first(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield from _children_first(child, path)
        yield path


def _with_boundary(sites: list[Site]) -> list[Site]:
    """Mark as boundaries the last site, where the stage hands its result on, the last layer, and logits.

    Logits alone would not do: a chunk of a prompt that samples nothing has none, and a NaN it leaves in the KV cache
    would be blamed on a later step and layer.
    """
    last_layer = max((site.number for site in sites if site.name.endswith(".resid_post")), default=-1)
    ends = {len(sites) - 1, last_layer}
    return [replace(site, boundary=site.number in ends or site.name == "logits") for site in sites]


def _with_axis(site: Site, axes: Mapping[str, str]) -> Site:
    axis = next((axis for glob, axis in axes.items() if matches(glob, site.name, site.fqn)), site.axis)
    return replace(site, axis=axis)


def require(glob: str, sites: tuple[Site, ...]) -> list[Site]:
    """Return the sites a glob names. Raises SiteError with the nearest names when it names none."""
    found = [site for site in sites if matches(glob, site.name, site.fqn)]
    if found:
        return found
    names = [site.name for site in sites]
    near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
    raise SiteError(f"no site matches {glob!r}; the nearest are {', '.join(near) or '(this model has no site)'}")
