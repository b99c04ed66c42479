"""The sites of a model whose layers are known, from the table of architectures; of one that only looks familiar, those
few that its names of modules tell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from insitu.families import MEANINGS, OF_HEADS, OFTEN, Family, Place
from insitu.sites.architectures import FAMILIES, family_of
from insitu.sites.site import Part, Site

if TYPE_CHECKING:
    from torch import nn

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
"""Also which modules outside layers are tapped without a rule."""
_OFTEN_OUTSIDE: Final = frozenset(fqn for _, fqns in _OUTSIDE for fqn in fqns)


@dataclass(frozen=True)
class Stack:
    """Layers that run one after the other."""

    base: str
    """Path of the module that holds the list of them."""
    layers: Mapping[int, tuple[str, Family | None]]
    """Number -> path, and family where it is known."""
    prefix: str = ""
    """What its sites' names begin with, where a model has several: `encoder.`"""


def stacks_of(modules: Mapping[str, nn.Module], families: Sequence[Family] = FAMILIES) -> list[Stack]:
    """Return the stacks of layers that the families hold, in order of their modules."""
    found: dict[str, dict[int, tuple[str, Family | None]]] = {}
    bases: dict[str, str] = {}
    numbered = {fqn: module for fqn, module in modules.items() if fqn.rpartition(".")[2].isdigit()}
    for fqn, module in numbered.items():
        family, head = family_of(module, families), fqn.rpartition(".")[0]
        if family is not None and f".{head}".endswith(f".{family.holder}"):
            bases[head] = head.removesuffix(family.holder).removesuffix(".")
            found.setdefault(bases[head], {})[int(fqn.rpartition(".")[2])] = (fqn, family)
    for fqn, module in numbered.items():  # layers of another class among those that are known; not placeholders
        head, _, number = fqn.rpartition(".")
        if head in bases and any(True for _ in module.children()):
            found[bases[head]].setdefault(int(number), (fqn, None))
    labels = {base: base.rpartition(".")[2] for base in found}
    if len(set(labels.values())) < len(labels):
        labels = {base: base for base in found}
    return [
        Stack(base, dict(sorted(layers.items())), f"{labels[base]}." if len(found) > 1 else "")
        for base, layers in found.items()
    ]


def alike_stacks(modules: Mapping[str, nn.Module]) -> list[Stack]:
    """Return the layers that look familiar by their names, as one stack."""
    alike = {int(match[1]): (fqn, None) for fqn in modules if (match := _LAYERS.match(fqn))}
    return [Stack("", dict(sorted(alike.items())))] if alike else []


@dataclass
class NamedSites:
    """Collects the sites of a model's stacks, in order of execution, and why names that others have are absent."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    sites: list[Site] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, modules: Mapping[str, nn.Module], stacks: Sequence[Stack]) -> NamedSites | None:
        """Return the sites of these stacks; None where there is none."""
        named = cls(model, modules)
        for stack in stacks:
            named.take(stack)
        return named if stacks else None

    def take(self, stack: Stack) -> None:
        """Add the sites of a stack. The head is taken with the last stack that has one."""
        family = next((family for _, family in stack.layers.values() if family is not None), None)
        if family is None:
            self._take_alike(stack)
            return
        self.sites = [site for site in self.sites if site.name != "logits"]
        self._add(family.embed, stack.prefix, stack.base)
        for number, (fqn, of_layer) in stack.layers.items():
            if of_layer is None:
                self._take_alike_layer(stack.prefix, number, fqn)
                continue
            for place in of_layer.places:
                self._add(place, f"{stack.prefix}L{number}.", fqn, number)
            self._say_absent(of_layer, f"{stack.prefix}L{number}.")
        if family.final_norm is not None:
            self._add(family.final_norm, stack.prefix, stack.base)
        there = [place for place in family.logits if place.path in self.modules]
        self._add(there[0] if there else family.logits[0], "", "")
        self._say_absent(family, stack.prefix, outside=True)

    def _say_absent(self, family: Family, prefix: str, outside: bool = False) -> None:
        present = {site.name for site in self.sites}
        for name, reason in family.absent.items():
            if (name in ("embed", "final_norm", "logits")) == outside and prefix + name not in present:
                self.absent[prefix + name] = reason

    def _add(self, place: Place, prefix: str, around: str, layer: int | None = None) -> None:
        fqn = ".".join(path for path in (around, place.path) if path)
        module = self.modules.get(fqn)
        name = prefix + place.name
        if module is None:
            self.absent[name] = f"this {type(self.model).__name__} has no module {fqn}"
            return
        config = config_of(self.modules[around] if layer is not None else self.model)
        self.sites.append(
            Site(
                0,
                name,
                fqn,
                layer,
                place.io,
                place.index,
                shard_of(fqn, place.io, place.name in OF_HEADS, config),
                place.axis,
                _num_experts(place.name, module),
                dtype=place.dtype or dtype_of(module, self.model),
                part=_part(place, config),
                default=place.name in OFTEN if layer is not None else fqn in _OFTEN_OUTSIDE and place.io == "out",
            )
        )

    def _take_alike(self, stack: Stack) -> None:
        for name, fqns in _OUTSIDE[:1]:
            self.sites += [self._alike(name, fqn) for fqn in fqns if fqn in self.modules]
        for number, (fqn, _) in stack.layers.items():
            self._take_alike_layer("", number, fqn)
        for name, fqns in _OUTSIDE[1:]:
            self.sites += [self._alike(name, fqn) for fqn in fqns if fqn in self.modules]

    def _take_alike_layer(self, prefix: str, number: int, fqn: str) -> None:
        self.sites += self._alike_in_layer(prefix, number, fqn)
        present = {site.name for site in self.sites}
        unverified = f"where it is in a {type(self.modules[fqn]).__name__} was never verified; name its module"
        names = {f"{prefix}L{number}.{name}": unverified for name in MEANINGS}
        self.absent |= {name: reason for name, reason in names.items() if name not in present}

    def _alike_in_layer(self, prefix: str, number: int, fqn: str) -> Iterator[Site]:
        for name, children in _IN_LAYER:
            found = [f"{fqn}.{child}" for child in children if f"{fqn}.{child}" in self.modules]
            for child in found[:1]:
                num_experts = _num_experts(name, self.modules[child])
                if name != "router_logits" or num_experts:
                    yield self._alike(f"{prefix}L{number}.{name}", child, number, num_experts)
        yield self._alike(f"{prefix}L{number}.resid_post", fqn, number)

    def _alike(self, name: str, fqn: str, layer: int | None = None, num_experts: int = 0) -> Site:
        return Site(0, name, fqn, layer, num_experts=num_experts, dtype=dtype_of(self.modules[fqn], self.model))


def can_be_called(module: nn.Module) -> bool:
    """Tell whether a module has a forward; a list or dict of modules has none, and would be a site that never fires."""
    forward = getattr(type(module), "forward", None)
    return forward is not None and getattr(forward, "__name__", "") != "_forward_unimplemented"


def dtype_of(module: nn.Module, model: nn.Module) -> str:
    """Return the dtype of a module's first parameter that is floating point, else of the model's; "" without any."""
    for owner in (module, model):
        found = next((p.dtype for p in owner.parameters() if p.is_floating_point()), None)
        if found is not None:
            return str(found).removeprefix("torch.")
    return ""


def config_of(module: nn.Module) -> Any:
    """Return the transformers config of a layer or model: its own, or that of the first module in it that has one."""
    return next((child.config for child in module.modules() if hasattr(child, "config")), None)


def _num_experts(name: str, module: nn.Module) -> int:
    """Return how many experts a router has; 0 for what is none, such as the gate of a plain feed-forward layer."""
    counts = (getattr(module, "num_experts", 0), getattr(module, "top_k", 0)) if name == "router_logits" else (0, 0)
    return counts[0] if all(isinstance(count, int) and count > 0 for count in counts) else 0


def _part(place: Place, config: Any) -> Part | None:
    """Return the columns that are queries, keys or values, where one projection makes all three."""
    if not place.fused:
        return None
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    widths = (width,) * 3 if place.fused == "heads" else (heads * width, shared * width, shared * width)
    at = "qkv".index(place.name)
    return Part(sum(widths), sum(widths[:at]), sum(widths[: at + 1]))


def shard_of(fqn: str, io: str, of_heads: bool, config: Any) -> str:
    """Return how ranks of tensor parallelism hold a tensor, by the plan that transformers has for the model."""
    plan: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", fqn)
    style = next((style for key, style in plan.items() if f".{pattern}".endswith(f".{key}")), "")
    if style != ("colwise" if io == "out" else "rowwise"):
        return "replicated"
    return "head" if of_heads else "column"
