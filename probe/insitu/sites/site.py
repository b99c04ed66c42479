"""What a site is: a named place where a model can be observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from insitu.rules.rule import matches

if TYPE_CHECKING:
    import torch

BY_PATH: Final = "module:"
"""What a glob over paths of modules begins with, and the name of a site that has no other."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the columns: of every `run` of them those from `start` up to `stop`, side by side."""

    run: int
    start: int
    stop: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return those columns of a tensor [..., columns]."""
        runs = x.reshape(*x.shape[:-1], x.shape[-1] // self.run, self.run)
        return runs[..., self.start : self.stop].flatten(-2)


@dataclass(frozen=True, slots=True)
class Site:
    """A named place in a model. `number` is its column in every slab, in order of execution."""

    number: int
    name: str
    fqn: str
    layer: int | None = None
    io: str = "out"
    """"out": what the module returns; "in": a tensor it is given, positional arguments before keywords."""
    index: int = 0
    """Which element, where the module returns a tuple; which of the tensors it is given."""
    shard: str = "replicated"
    axis: str = "tokens"
    num_experts: int = 0
    """Of a router: how many experts it chooses from; what it chose is its last output, int64[tokens, top_k]."""
    boundary: bool = False
    """Per-row sum and absmax are taken in every step: the stage's last layer and last site, and logits."""
    dtype: str = ""
    """What its module's parameters say; what it really is, the table `sites` has after the first step."""
    part: Part | None = None
    """Which columns, where one projection makes queries, keys and values together."""
    default: bool = True
    """Tapped without a rule that names it."""

    @property
    def module(self) -> str | None:
        """Return the path of the module all of whose output this is; None where it is something else of it."""
        return self.fqn if self.io == "out" and self.index == 0 and self.part is None else None

    @property
    def is_residual(self) -> bool:
        """True for what a whole layer returns: it has what the layer read to compare with."""
        return self.name.endswith(".resid_post")


class SiteError(ValueError):
    """A requested site is nowhere, or nothing would ever come from it; the message says why, and names the nearest."""


def is_named(glob: str, site: Site) -> bool:
    """Return whether a rule's glob means a site.

    `module:` means what modules return. Where the last part of a glob is a bare `*` (`*`, `L3.*`) it means the
    sites that are tapped anyway; the others want to be spelt.
    """
    if not site.default and glob.rpartition(".")[2] == "*" and not glob.startswith(BY_PATH):
        return False
    return matches(glob, site.name, site.module)
