"""Statistics of other packages: the entry-point group `insitu.statistics`. Loads no torch.

A rule asks for one by its name, `insitu.Rule(sites="L*.mlp_out", take="acme.row_norm")`. A mergeable triple, as ours
are: `compute` makes a part inside the forward pass, `combine` adds parts up, `finalise` makes of them what a person
reads. How to write one: docs/extending.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from insitu.config import load
from insitu.plugins.discovery import STATISTICS, Broken, Plugin, PluginError, named, one_line
from insitu.statistics.parts import Floats, Ints

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("insitu")


class Statistic(Protocol):
    """What a plug-in gives: the entry point is a class, or any callable without arguments, that makes one.

    A part is float64[len(fields)]: what one step of one rank tells. As it stands, it tells nothing.
    """

    fields: tuple[str, ...] = ()
    """What the numbers of a part are called, in their order: stored with each part."""

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Return the part of the valid rows x, [rows, width] with at least one of each, as a vector on x's device.

        Runs inside the forward pass, where the tensor lies: x must not be changed, and no value of it be read back to
        the host (`.item()`, `if x.any()`, `x[x > 0]`), which would make the model wait. Sums want `x.double()`.
        """
        return x.new_zeros(len(self.fields))

    def combine(self, a: Floats, b: Floats) -> Floats:
        """Return a and b added up, [n, len(fields)] each: row i is the part of all that a[i] and b[i] are parts of.

        In any order and grouping: steps and ranks come as they come.
        """
        return a + b

    def finalise(self, parts: Floats) -> Mapping[str, NDArray[Any]]:
        """Return what a person reads of [n, len(fields)], by name, n values each; NaN is what nobody can tell."""
        return {name: parts[:, at] for at, name in enumerate(self.fields)}


@dataclass(frozen=True, slots=True)
class Measure:
    """A statistic that was loaded, and where it came from."""

    name: str
    statistic: Statistic
    fields: tuple[str, ...]
    plugin: str
    """Name, package and version, for people."""


def measure_of(name: str, plugin: Plugin) -> Measure:
    """Load a statistic. Raises Broken for one that is none, and whatever its import and making raise."""
    statistic = plugin.load()()
    return Measure(name, statistic, checked_fields(statistic), str(plugin))


def checked_fields(statistic: Any) -> tuple[str, ...]:
    """Return the names of a part's numbers. Raises Broken where they are none."""
    fields = tuple(getattr(statistic, "fields", ()))
    if not fields or not all(isinstance(field, str) and field for field in fields) or len(set(fields)) < len(fields):
        raise Broken(f"its fields are {fields!r}; they want to be different names, one or more")
    return fields


def load_measures(names: Iterable[str]) -> dict[str, Measure]:
    """Return the statistics of these names; those that are switched off are left out, which is said.

    Raises PluginError for a name nobody has installed, or that cannot be loaded.
    """
    found, off = {}, load().plugins_off
    for name in names:
        if name in off:
            logger.warning("insitu: the statistic %s is switched off (plugins_off) and is not taken", name)
            continue
        plugin = named(STATISTICS, name)
        try:
            found[name] = measure_of(name, plugin)
        except Exception as error:  # another author's code
            raise PluginError(f"the statistic {plugin} cannot be loaded: {one_line(error)}") from error
    return found


def merge(statistic: Statistic, parts: Floats, group: Ints) -> Floats:
    """Return the parts [n, fields] of each group added up, in order of the groups' numbers.

    Neighbours are combined in pairs, over and over: as many calls as the largest group has doublings.
    """
    order = np.argsort(group, kind="stable")
    parts, group = parts[order], group[order]
    while len(group) > len(np.unique(group)):
        place = np.arange(len(group)) - np.searchsorted(group, group)
        is_second = place % 2 == 1
        has_second = np.append(is_second[1:], False)
        parts[has_second] = combined(statistic, parts[has_second], parts[is_second])
        parts, group = parts[~is_second], group[~is_second]
    return parts


def combined(statistic: Statistic, a: Floats, b: Floats) -> Floats:
    """Return what the statistic makes of two parts. Raises Broken where that is not as many numbers."""
    with np.errstate(all="ignore"):
        found = np.asarray(statistic.combine(a, b), np.float64)
    if found.shape != a.shape:
        raise Broken(f"combine of {list(a.shape)} numbers and as many gave {list(found.shape)}")
    return found


def finalised(statistic: Statistic, parts: Floats) -> dict[str, NDArray[Any]]:
    """Return what a person reads of parts. Raises Broken where that is not a value of each."""
    with np.errstate(all="ignore"):
        told = {str(name): np.asarray(values) for name, values in statistic.finalise(parts).items()}
    for name, values in told.items():
        if values.shape != (len(parts),) or values.dtype.kind not in "biuf":
            raise Broken(f"finalise gave {name} as {values.dtype}{list(values.shape)}, not a number for each part")
    return told
