"""What sites of another package promise, tried on the model it names: each is there or says why, and each fires.

`check_architecture` is for the tests of such a package too (`insitu.testing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import nn

import insitu
from insitu.families import Family
from insitu.plugins.discovery import Broken, NotChecked, Plugin
from insitu.site_plugins import Architecture, checked_families, known_too
from insitu.sites.architectures import FAMILIES
from insitu.sites.catalogue import catalogue
from insitu.sites.named import NamedSites, stacks_of
from insitu.testing.recording import Recording

MAX_ROWS: Final = 256
"""Rows of the example's call that are looked at."""


def check(plugin: Plugin, _: str | None) -> str:
    """Check installed sites: what `insitu plugins check` says."""
    return check_architecture(plugin.load()())


def check_architecture(architecture: Architecture) -> str:
    """Return what held of an architecture. Raises Broken, in a sentence, where it breaks a promise, and NotChecked
    without an example.
    """
    families = checked_families(architecture)
    if not families:
        raise Broken("it has no family of layers")
    example = architecture.example()
    if example is None:
        raise NotChecked("it names no model: example() returns none")
    model, inputs = example
    named = _resolved(model, families)
    with known_too(families):
        records, names = _observed(model, inputs)
    _check_embed(records, names)
    absent = f", {len(named.absent)} said why not" if named.absent else ""
    return f"{len(named.sites)} sites of a {type(model).__name__} fired{absent}; its output is the same bits"


def _resolved(model: nn.Module, families: Sequence[Family]) -> NamedSites:
    """Return where the names lie. Raises Broken for one that lies nowhere and says no reason."""
    modules = dict(model.named_modules())
    if stacks_of(modules, FAMILIES):
        raise Broken(f"insitu knows the layers of a {type(model).__name__} by itself, and takes its own table")
    named = NamedSites.of(model, modules, stacks_of(modules, families))
    if named is None:
        wanted = ", ".join(f"{family.package}.{name}" for family in families for name in family.layers)
        there = sorted({f"{type(module).__module__}.{type(module).__name__}" for module in modules.values()})
        raise Broken(
            f"no list of layers in a {type(model).__name__} holds a {wanted}; its modules are {', '.join(there)}"
        )
    reasons = {reason for family in families for reason in family.absent.values()}
    for name, why in named.absent.items():
        if why not in reasons:
            raise Broken(f"{name} lies nowhere: {why}; correct its path, or give a reason in the family's `absent`")
    return named


def _observed(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Recording, dict[int, str]]:
    """Run the model with each site tapped, and return what was recorded and the names of sites by number."""
    records, rules = Recording(), [insitu.Rule(sites="?*", requests="all")]
    expected = {site.name for site in catalogue(model).sites}
    with torch.inference_mode():
        bare = _tensors(model(**inputs))
        with insitu.attach(model, to=records, rules=rules, max_rows=MAX_ROWS) as session:
            for _ in range(2):  # widths are learned in the first
                if not all(map(torch.equal, _tensors(model(**inputs)), bare)):
                    raise Broken("the model's output has other bits while it is observed")
            silent = session.coverage().never_fired
            names = {site.number: site.name for site in session.sites()}
    if not names:
        raise NotChecked("insitu is switched off here, so nothing can be attached")
    if silent:
        raise Broken(f"in a step of the example these sites never fired: {', '.join(silent)}")
    if unfit := expected - {names[row["site"]] for row in records.rows("captures", step_id=1)}:
        raise Broken(f"no rows could be taken of {', '.join(sorted(unfit))}: they are no tensors of numbers")
    return records, names


def _tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of what a model returned, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _check_embed(records: Recording, names: Mapping[int, str]) -> None:
    """See to it that `embed` is what it is said to be: what the first layer is given."""
    numbers = {name: number for number, name in names.items()}
    given = next((name for name in numbers if name.endswith("L0.resid_pre")), "")
    embed = given.removesuffix("L0.resid_pre") + "embed"
    if not given or embed not in numbers:
        return
    first, second = (_rows(records, numbers[name]) for name in (embed, given))
    if not np.array_equal(first, second):
        raise Broken(f"{embed} is not what the first layer is given ({given}), as its name says")


def _rows(records: Recording, site: int) -> np.ndarray[Any, Any]:
    return np.stack([np.frombuffer(row["data"], np.uint8) for row in records.rows("captures", step_id=1, site=site)])
