"""What a tap does where its site's statistics are wanted: a step of the full variant, one in many."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from insitu.sites.site import Site
from insitu.statistics.reductions import compute, compute_checksum
from insitu.statistics.staging import Place, Staging, Waiting, places_of
from insitu.statistics.workspace import Workspace
from insitu.taps.plain import rows_of

logger = logging.getLogger("insitu")


def source_of(x: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return what a layer that returned x had read, or None where that cannot be known.

    A layer that writes into its input has changed it by now: where both share memory nothing is said.
    """
    source = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(source, torch.Tensor) or source.shape != x.shape or not source.is_floating_point():
        return None
    if source.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return None
    return source.detach()


def has_scores(site: Site) -> bool:
    """Tell whether rows of a site are scores, of token ids or of experts, of which a softmax makes probabilities."""
    return site.name == "logits" or site.name.endswith(".router_logits")


class StatisticTaps:
    """Takes statistics; a site of which there are none (complex numbers, no memory) is not tried again."""

    def __init__(self, step_id: torch.Tensor) -> None:
        """step_id: of the control block; what is written on a device comes from there."""
        self._step_id = self._step = step_id
        self._host_step: int | None = None
        self._staging: Staging | None = None
        self._without: set[int] = set()

    def take(
        self,
        site: Site,
        x: torch.Tensor,
        source: torch.Tensor | None,
        place: Place,
        work: Workspace,
        host_step: int | None,
    ) -> None:
        """Take the statistics of the valid rows x, now or in `finish`. host_step: where the place is in host memory."""
        if site.number in self._without:
            return
        if self._staging is None or self._staging.work is not work:
            self._staging = Staging(work)
        if host_step != self._host_step:
            self._host_step = host_step
            self._step = (
                self._step_id if host_step is None else torch.tensor(host_step, dtype=torch.int64, device="cpu")
            )
        try:
            self._take(site, rows_of(x), source, place, self._staging)
        except (RuntimeError, TypeError, ValueError) as error:
            self._give_up([site], error)

    def _take(self, site: Site, x: torch.Tensor, source: torch.Tensor | None, place: Place, staging: Staging) -> None:
        if x.is_complex():
            raise TypeError(f"no statistics of {x.dtype}")
        before = None if source is None else rows_of(source)[: x.shape[0]]
        if site.boundary and site.shard == "replicated":
            compute_checksum(x[None], places_of([place]), staging.work)
        waiting = staging.find(x)
        if waiting is not None:
            if not waiting.has_room(x.shape[0], has_scores=has_scores(site)):
                self._measure(waiting)
            waiting.add(site, x, before, place, has_scores=has_scores(site))
            return
        staging.work.fit(x.shape[1])
        sources = None if before is None else before[None]
        scores = has_scores(site)
        compute(x[None], places_of([place]), staging.work, self._step, has_scores=scores, source=sources, sourced=(0,))

    def finish(self) -> None:
        """Take the statistics of what waits: the step is at its end."""
        for waiting in self._staging.all() if self._staging is not None else ():
            self._measure(waiting)

    def _measure(self, waiting: Waiting) -> None:
        try:
            waiting.measure(self._step)
        except (RuntimeError, TypeError, ValueError) as error:
            self._give_up(waiting.sites, error)
        finally:
            waiting.clear()

    def _give_up(self, sites: Iterable[Site], error: Exception) -> None:
        for site in sites:
            self._without.add(site.number)
            logger.warning("insitu: no statistics of %s (%s: %s)", site.name, type(error).__name__, error)
