"""Architectures of other packages, by the entry-point group `insitu.sites`: for models whose layers nobody here knows.

How to write one: docs/extending.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from insitu.config import load
from insitu.families import MEANINGS, Family
from insitu.guard import Guard
from insitu.plugins.discovery import SITES, Broken, wanted
from insitu.sites.named import NamedSites, stacks_of

if TYPE_CHECKING:
    from torch import nn


class Architecture(Protocol):
    """What a plug-in gives: the entry point is a class, or any callable without arguments, that makes one.

    As it stands, it knows no layer.
    """

    def families(self) -> Sequence[Family]:
        """Return tables of sites (see `insitu.sites.architectures`): classes of layers, and where names lie in them."""
        return ()

    def example(self) -> tuple[nn.Module, Mapping[str, Any]] | None:
        """Return a small model with such layers and the arguments of a call: what `insitu plugins check` looks at."""
        return None


@dataclass(frozen=True)
class Known:
    """The families of one plug-in, and where its errors stop."""

    families: tuple[Family, ...]
    guard: Guard


_also: list[Known] = []
"""Known for a while without being installed (`known_too`)."""


@contextmanager
def known_too(families: Sequence[Family]) -> Iterator[None]:
    """Let models of these families be attached by their names in this block, without a package around them."""
    _also.append(Known(tuple(families), Guard("sites of a test", "models are tapped without them", are_several=True)))
    try:
        yield
    finally:
        _also.pop()


def checked_families(architecture: Any) -> tuple[Family, ...]:
    """Return the families of a plug-in. Raises Broken for what is none, and for names of sites that mean nothing."""
    families = tuple(architecture.families())
    for family in families:
        if not isinstance(family, Family):
            raise Broken(f"{family!r} is no insitu.families.Family")
        outside = (family.embed, *family.logits, *((family.final_norm,) if family.final_norm else ()))
        unknown = {place.name for place in (*family.places, *outside)} | family.absent.keys()
        if unknown := unknown - MEANINGS.keys():
            known = ", ".join(MEANINGS)
            raise Broken(f"{family.title} has the names {', '.join(sorted(unknown))}; those with a meaning are {known}")
    return families


def plugged_sites(model: nn.Module, modules: Mapping[str, nn.Module]) -> NamedSites | None:
    """Return the sites of a model by the first plug-in that knows its layers; None where none does.

    Installed packages are looked through once a process. What a plug-in raises is said once, and it is not asked again.
    """
    for known in (*_also, *_installed(tuple(sys.path), load().plugins_off)):
        if known.guard.num_errors:
            continue
        try:
            named = NamedSites.of(model, modules, stacks_of(modules, known.families))
        except Exception as error:  # another author's table
            known.guard.contain(error)
        else:
            if named is not None:
                return named
    return None


@lru_cache(maxsize=8)
def _installed(path: tuple[str, ...], off: tuple[str, ...]) -> tuple[Known, ...]:
    """Return what is installed. path: where packages are looked for, which tells one answer from another."""
    found = []
    for plugin in wanted(SITES, off):
        guard = Guard(f"sites plug-in {plugin}", "models are tapped without it")
        families: tuple[Family, ...] = ()
        try:
            families = checked_families(plugin.load()())
        except Exception as error:  # another author's code
            guard.contain(error)
        found.append(Known(families, guard))
    return tuple(found)
