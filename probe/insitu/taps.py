"""Taps: what runs inside the model's forward pass, once a site. The hot path.

A tap reduces the tensor into its place in the current slab, then copies the step id from the control block into
its stamp. It reads Python state and changes none: no allocation beyond what torch's own reduction needs, no sync,
no lock, no clock, no log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from insitu.guard import Guard
from insitu.sites import Site
from insitu.slab import Plan, Views

_DIMS: Final = tuple(tuple(range(n)) for n in range(9))
_INF: Final = float("inf")
Tap = Callable[[torch.Tensor], None]


@dataclass
class Current:
    """The step that is open now. The host writes it between steps; taps only read it."""

    thread: int = 0
    """Identifier of the thread whose step is open; 0 = none, so no thread matches."""
    views: Views | None = None
    stamp: torch.Tensor | None = None
    """0-d int64 on the device: `control.step_id`."""
    num_valid: dict[str, int] = field(default_factory=dict)
    """Valid rows by axis; -1: all are."""
    rows: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Full variant only: site -> (row area [max_rows + 1, width], destination vector [max_rows])."""
    learning: bool = False
    """True until every site has fired once: shapes and dtypes are noted, on the host."""


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(-1, 1)


class Taps:
    """Installs and removes the taps of one model, and knows what they have learned about its sites."""

    def __init__(self, plan: Plan, current: Current, guard: Guard) -> None:
        self.plan = plan
        self.current = current
        self.shapes: dict[int, tuple[int, torch.dtype]] = {}
        """Site -> (width, dtype), learned when it first fires."""
        self._guard = guard
        self._handles: list[RemovableHandle] = []

    def install(self, model: nn.Module) -> Tap | None:
        """Register one hook a site; return the tap of the model's own output, which has no hook, if any."""
        modules = dict(model.named_modules())
        root = None
        for site in self.plan.sites:
            tap = self.make(site)
            if not site.fqn:
                root = tap
                continue
            self._handles.append(modules[site.fqn].register_forward_hook(self._hook(tap, site.index)))
        return root

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, tap: Tap, index: int) -> Callable[[nn.Module, Any, Any], None]:
        current, guard = self.current, self._guard

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if current.thread != get_ident() or current.views is None:
                return
            try:
                tap(output if isinstance(output, torch.Tensor) else output[index])
            except Exception as error:
                current.views = None
                guard.contain(error)

        return hook

    def make(self, site: Site) -> Tap:
        """Return the tap of a site: a function of the tensor, to be called inside an open step."""
        current, number, axis, max_rows = self.current, site.number, site.axis, self.plan.max_rows
        boundary = site.boundary

        def tap(x: torch.Tensor) -> None:
            views = current.views
            assert views is not None and current.stamp is not None, "a tap runs inside an open step only"
            if current.learning:
                self.shapes.setdefault(number, (x.shape[-1] if x.ndim > 1 else 1, x.dtype))
            if not x.is_floating_point():
                return
            if x.requires_grad:
                x = x.detach()
            valid = current.num_valid[axis]
            wanted = current.rows.get(number) if current.rows is not None else None
            if boundary or wanted is not None or valid >= 0:
                x = _flat(x)
                if 0 <= valid < x.shape[0]:
                    x = x[:valid]
            torch.sum(x, _DIMS[x.ndim], dtype=torch.float32, out=views.canary[number])
            if boundary or wanted is not None:
                views.count[number].fill_(x.shape[0])
                x = x[:max_rows]
            n = x.shape[0]
            if boundary:
                torch.sum(x, 1, dtype=torch.float32, out=views.row_sum[number][:n])
                torch.linalg.vector_norm(x, _INF, 1, dtype=torch.float32, out=views.row_absmax[number][:n])
            if wanted is not None and wanted[0].shape[1] == x.shape[1]:
                area, dest = wanted
                area.index_copy_(0, dest[:n], x)
            views.stamp[number].copy_(current.stamp)

        return tap
