"""Which sites a model has: by name where its architecture is known, by the paths of its modules elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from insitu.families import NO_ATTENTION, OF_ATTENTION
from insitu.rules.rule import matches
from insitu.site_plugins import plugged_sites
from insitu.sites.named import NamedSites, alike_stacks, can_be_called, config_of, dtype_of, shard_of, stacks_of
from insitu.sites.paths import modules_of
from insitu.sites.site import BY_PATH, Site, SiteError, is_named
from insitu.transformers.models import axes_of

if TYPE_CHECKING:
    from torch import nn

MAX_MODULE_SITES: Final = 256
"""Of a model of unknown shape at most this many sites are tapped without a rule, outermost first: each costs one
reduction a step."""
NUM_NEAREST: Final = 3


@dataclass(frozen=True)
class Catalogue:
    """Every site of a model, and why what is no site is none."""

    sites: tuple[Site, ...]
    """In order of execution, numbered as if all were tapped."""
    modules: Mapping[str, Site]
    """Path -> the site of what that module returns, for modules that have no site with a name of its own."""
    absent: Mapping[str, str]
    """Name, or `module:` and a path -> why nothing could be observed there."""

    def find(self, glob: str) -> list[Site]:
        """Return the sites a glob means. Raises SiteError, with the reason if it is known and the nearest names."""
        found = [site for site in self.sites if is_named(glob, site)]
        if glob.startswith(BY_PATH):
            found += [site for site in self.modules.values() if is_named(glob, site)]
        if not found:
            raise SiteError(f"no site matches {glob!r}{self._why(glob)}; the nearest are {self._nearest(glob)}")
        return found

    def not_axes(self, globs: Iterable[str]) -> list[str]:
        """Return an error for each glob of `axes` that means no site, not even one that waits for a rule."""
        return [error for glob in globs if (error := self._axis_error(glob))]

    def _axis_error(self, glob: str) -> str:
        sites = (*self.sites, *self.modules.values())
        try:
            if not any(matches(glob, site.name, site.fqn) for site in sites):
                self.find(glob)
        except SiteError as error:
            return str(error)
        return ""

    def plan(self, globs: Sequence[str] = ()) -> tuple[Site, ...]:
        """Return the sites to tap, numbered: those that always are, and those the globs mean. Raises SiteError."""
        named = {site.name: site for glob in globs for site in self.find(glob)}
        kept = [site for site in self.sites if site.default or site.name in named]
        for site in named.values():
            if site.name.startswith(BY_PATH):
                kept.insert(_place_of(site, kept), site)
        return _numbered(kept)

    def _why(self, glob: str) -> str:
        for name, reason in self.absent.items():
            path = name.removeprefix(BY_PATH) if name.startswith(BY_PATH) else None
            if matches(glob, name, path):
                return f": {reason}"
        if not glob.startswith(BY_PATH) and glob in self.modules:
            return ": the path of a module is written with `module:` before it"
        if glob.rpartition(".")[2] in OF_ATTENTION:
            return f": {NO_ATTENTION}"
        return ""

    def _nearest(self, glob: str) -> str:
        names = self._in_layers_of(glob) or [site.name for site in self.sites]
        paths = [BY_PATH + site.fqn for site in (*self.sites, *self.modules.values()) if site.module]
        if glob in self.modules:
            return BY_PATH + glob
        known = paths if glob.startswith(BY_PATH) else names
        near = difflib.get_close_matches(glob, list(dict.fromkeys(known)), n=NUM_NEAREST, cutoff=0.3)
        return ", ".join(near or known[:NUM_NEAREST]) or "none: this model has no site"

    def _in_layers_of(self, glob: str) -> list[str]:
        """Return what could stand after the layers that a glob means: for `L[0-3].x` it is `L[0-3].q` and so on."""
        layers, _, _ = glob.rpartition(".")
        there = [site for site in self.sites if site.layer is not None and matches(f"{layers}.*", site.name, None)]
        return list(dict.fromkeys(f"{layers}.{site.name.rpartition('.')[2]}" for site in there))


def catalogue(model: nn.Module, axes: Mapping[str, str] | None = None) -> Catalogue:
    """Return every site of a model. axes: site glob -> "tokens" | "samples" | "batch", where the default is wrong."""
    axes = {**(axes or {}), **{name: axis for name, axis in axes_of(model).items() if name not in (axes or {})}}
    modules = modules_of(model)
    named = (
        NamedSites.of(model, modules, stacks_of(modules))
        or plugged_sites(model, modules)
        or NamedSites.of(model, modules, alike_stacks(modules))
    )
    absent = {} if named is None else named.absent
    found = list(_by_path(model, modules)) if named is None else named.sites
    sites = _numbered([_with_axis(site, axes) for site in _with_boundary(found)])
    taken = {site.module for site in sites}
    paths = {fqn: module for fqn, module in modules.items() if fqn and fqn not in taken}
    absent |= {
        BY_PATH + fqn: f"{fqn} is a {type(module).__name__}, which is never called"
        for fqn, module in paths.items()
        if not can_be_called(module)
    }
    config = config_of(model)
    others = {
        fqn: _with_axis(_of_module(fqn, dtype_of(module, model), config), axes)
        for fqn, module in paths.items()
        if can_be_called(module)
    }
    return Catalogue(sites, others, absent)


def of_sites(sites: Iterable[Site], absent: Mapping[str, str]) -> Catalogue:
    """Return the catalogue of a model whose sites somebody else knows. sites: in order of execution."""
    return Catalogue(_numbered(_with_boundary(sites)), {}, absent)


def resolve(model: nn.Module, axes: Mapping[str, str] | None = None, globs: Sequence[str] = ()) -> tuple[Site, ...]:
    """Return the sites of a model that are tapped when rules name `globs`, in order of execution.

    Raises SiteError for a glob that means none.
    """
    return catalogue(model, axes).plan(globs)


def _of_module(fqn: str, dtype: str, config: Any) -> Site:
    """Return the site of what a module returns that has no name."""
    shard = shard_of(fqn, "out", False, config)
    return Site(-1, BY_PATH + fqn, fqn, shard=shard, dtype=dtype, default=False)


def _by_path(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[Site]:
    """Yield a site a module, children before parents, and `output`, the model's own."""
    paths = [fqn for fqn, module in modules.items() if fqn and can_be_called(module)]
    kept = set(sorted(paths, key=lambda fqn: fqn.count("."))[:MAX_MODULE_SITES])
    callable_paths = set(paths)
    for fqn in _children_first(model, ""):
        if fqn in callable_paths:
            yield Site(0, fqn, fqn, axis="batch", dtype=dtype_of(modules[fqn], model), default=fqn in kept)
    yield Site(0, "output", "", axis="batch", dtype=dtype_of(model, model))


def _children_first(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield from _children_first(child, path)
        yield path


def _with_boundary(sites: Iterable[Site]) -> list[Site]:
    """Mark as boundaries the last site, where the stage hands its result on, the last layer, and logits.

    Logits alone would not do: a chunk of a prompt that samples nothing has none, and a NaN it leaves in the KV cache
    would be blamed on a later step and layer. Sites that wait for a rule are no boundaries: what a step pays would
    depend on it.
    """
    sites = list(sites)
    always = [site.name for site in sites if site.default]
    layers = [name for name in always if name.endswith("resid_post")]
    ends = {*always[-1:], *layers[-1:], "logits"}
    return [replace(site, boundary=site.default and site.name in ends) for site in sites]


def _with_axis(site: Site, axes: Mapping[str, str]) -> Site:
    axis = next((axis for glob, axis in axes.items() if matches(glob, site.name, site.fqn)), site.axis)
    return replace(site, axis=axis)


def _numbered(sites: Sequence[Site]) -> tuple[Site, ...]:
    return tuple(replace(site, number=number) for number, site in enumerate(sites))


def _place_of(site: Site, among: Sequence[Site]) -> int:
    """Return where a module's site stands: before that of the innermost module around it; else at the end.

    Which of two sites ran first decides which is blamed for a bad value: a module nobody knows the place of must not
    come before those whose place is known.
    """
    around = [
        (len(other.module), place)
        for place, other in enumerate(among)
        if other.module and re.match(re.escape(other.module) + r"\.", site.fqn)
    ]
    return max(around)[1] if around else len(among)
