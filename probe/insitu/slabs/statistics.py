"""The ring of memory for statistics: a place for each site that a rule names, in as many slabs as may wait at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from insitu.rules.rule import SUMMARY, Rule
from insitu.sites.site import Site, is_named
from insitu.slabs.slab import NEVER, Ring
from insitu.statistics import layout
from insitu.statistics.parts import Floats, Ints
from insitu.statistics.staging import Place
from insitu.statistics.workspace import Workspace

NUM_SLABS: Final = 16
"""Sampled steps that may wait for the drain: with one in 16, 256 steps, as many as there are slabs of canaries."""


def periods(sites: Sequence[Site], rules: Sequence[Rule]) -> dict[int, tuple[Site, ...]]:
    """Return by N the sites whose statistics are taken in one step of N: of the first rule that names each.

    A partial site (what one rank holds before the all-reduce) is left out: it is no value of the model.
    """
    found: dict[int, list[Site]] = {}
    for site in sites:
        named = (rule for rule in rules if rule.take == SUMMARY and is_named(rule.sites, site))
        rule = next(named, None)
        if rule is not None and site.shard != "partial":
            found.setdefault(rule.period, []).append(site)
    return {every: tuple(each) for every, each in found.items()}


def phases(sites: Sequence[Site], rules: Sequence[Rule]) -> dict[int, int]:
    """Return, of sites whose statistics are for steps of one phase only, which that is."""
    found = {}
    for site in sites:
        rule = next((rule for rule in rules if rule.take == SUMMARY and is_named(rule.sites, site)), None)
        if rule is not None and rule.phase_number is not None:
            found[site.number] = rule.phase_number
    return found


class StatisticSlabs:
    """Places of statistics on the device, and the workspace that all sites use in turn."""

    def __init__(self, sites: Sequence[int], device: torch.device) -> None:
        """sites: their numbers."""
        self.sites = np.array(sites, np.int64)
        self.ring = Ring(NUM_SLABS)
        self.work = Workspace(device)
        shape = (NUM_SLABS, len(sites))
        with torch.inference_mode(False):
            self._ints = torch.zeros((*shape, layout.NUM_INTS), dtype=torch.int64, device=device)
            self._ints[:, :, layout.STAMP] = NEVER
            self._floats = torch.zeros((*shape, layout.NUM_FLOATS), dtype=torch.float64, device=device)
        self.places = tuple(
            {site: Place(self._ints[slab], self._floats[slab], row) for row, site in enumerate(sites)}
            for slab in range(NUM_SLABS)
        )

    def read(self, slabs: Sequence[int]) -> tuple[Ints, Floats]:
        """Return copies on the host: int64[n, sites, NUM_INTS] and float64[n, sites, NUM_FLOATS]."""
        at = torch.tensor(slabs, dtype=torch.int64, device=self._ints.device)
        return self._ints[at].cpu().numpy(), self._floats[at].cpu().numpy()
