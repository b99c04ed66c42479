"""What a tap does where its site's statistics are wanted: a step of the full variant, one in many."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from insitu.plain import rows_of
from insitu.reductions import Place, Workspace, compute
from insitu.sites import Site
from insitu.statistic_layout import STAMP

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


class StatisticTaps:
    """Takes statistics; a site of which there are none (complex numbers, no memory) is not tried again."""

    def __init__(self, step_id: torch.Tensor) -> None:
        """step_id: of the control block; what is written on a device comes from there."""
        self._step_id = step_id
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
        """Write the statistics of the valid rows x and then the step. host_step: where the place is in host memory."""
        if site.number in self._without:
            return
        try:
            x = rows_of(x)
            work.fit(x.shape[1])
            before = None if source is None else rows_of(source)[: x.shape[0]]
            compute(x, place, work, is_logits=site.name == "logits", source=before)
            if host_step is None:
                place.ints[STAMP].copy_(self._step_id)
            else:
                place.ints[STAMP].fill_(host_step)
        except (RuntimeError, TypeError, ValueError) as error:
            self._without.add(site.number)
            logger.warning("insitu: no statistics of %s (%s: %s)", site.name, type(error).__name__, error)
