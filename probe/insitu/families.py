"""What a table of sites is made of: names and what they mean, places in a layer, families of layers built alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

MEANINGS: Final[dict[str, str]] = {
    "embed": "what the first layer is given: tokens or patches, with positions where they are added",
    "resid_pre": "what a layer is given",
    "attn_in": "what attention projects: after the norm before it, where there is one",
    "q": "queries as projected: before a norm of heads, a rotation, a scale",
    "k": "keys as projected",
    "v": "values as projected",
    "attn_z": "the heads' results side by side, before the output projection",
    "attn_out": "what attention adds to the residual stream",
    "resid_mid": "the residual stream after attention was added",
    "cross_in": "what cross attention projects to queries",
    "cross_q": "its queries",
    "cross_z": "its heads' results side by side",
    "cross_out": "what it adds to the residual stream",
    "resid_cross": "the residual stream after cross attention was added",
    "mlp_in": "what the MLP, or the router and its experts, is given",
    "router_logits": "a score for each expert",
    "router_weights": "what each chosen expert's result is multiplied by",
    "router_topk": "which experts were chosen: int64",
    "mlp_act": "the MLP's activations, before its output projection",
    "mlp_out": "what the MLP, or its experts together, adds to the residual stream",
    "resid_post": "what a layer returns",
    "final_norm": "what the norm after the last layer returns",
    "logits": "what the head returns",
}
"""Every name in order of execution, and what it means wherever it is found."""
OF_ATTENTION: Final = (
    "attn_weights",
    "attn_probs",
    "attn_scores",
    "attn_logits",
    "attn_entropy",
    "attn_pattern",
    "attn_sink",
)
"""Names that people ask for and that no architecture here has."""
NO_ATTENTION: Final = (
    "what queries and keys make of each other stays inside the attention kernel; q and k alone, before rotation and "
    'without the cache, would give wrong values (docs/probe.md, "Attention is not among them")'
)
OF_HEADS: Final = frozenset({"q", "k", "v", "attn_z", "cross_q", "cross_z"})
"""Names whose columns are heads side by side."""
OFTEN: Final = frozenset({"attn_out", "router_logits", "mlp_out", "resid_post"})
"""Sites of a layer that are tapped without a rule. Each costs a reduction a step: the others wait to be named."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a site is. `path`: its module, from the layer or from what holds the layers; "" is that itself."""

    name: str
    path: str = ""
    io: str = "out"
    """"out": what the module returns; "in": a tensor it is given, positional arguments before keywords."""
    index: int = 0
    """Which element of a tuple it returns; which of the tensors it is given."""
    fused: str = ""
    """Of q, k, v that one projection makes: they lie as three "blocks", or as three parts of each of the "heads"."""
    dtype: str = ""
    """Where it is not that of the module's parameters."""
    axis: str = "tokens"


@dataclass(frozen=True, slots=True)
class Family:
    """Layers that are built alike, by the names of their classes, and what stands around them."""

    title: str
    layers: tuple[str, ...]
    """Names of the classes of their layers in `package`."""
    places: tuple[Place, ...]
    """In a layer, in order of execution."""
    holder: str = "layers"
    """Path of the list of layers from the module that holds it."""
    embed: Place = Place("embed", "embed_tokens")
    final_norm: Place | None = Place("final_norm", "norm")
    logits: tuple[Place, ...] = (Place("logits", "lm_head"),)
    """From the whole model; the first that is there."""
    flag: tuple[str, bool] | None = None
    """An attribute of the layer, and what it is in this family."""
    without: tuple[str, ...] = ()
    """Children no layer may have: with them the places would mean something else."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Names that mean nothing here, and why."""
    package: str = "transformers"
    """The package, or module, that defines those classes."""

    def holds(self, module: nn.Module) -> bool:
        """Return whether a module is a layer of this family: whose forward it runs. Others may bear the same name."""
        cls, forward = type(module), getattr(type(module), "forward", None)  # transformers wraps that of each subclass
        if forward is None:  # of a script
            return False
        of_forward = forward.__qualname__.rpartition(".")[0]
        written = ((cls.__module__, cls.__name__), (forward.__module__, of_forward))
        if not any(f"{where}.".startswith(f"{self.package}.") and name in self.layers for where, name in written):
            return False
        if any(hasattr(module, child) for child in self.without):
            return False
        return self.flag is None or getattr(module, self.flag[0], None) is self.flag[1]
