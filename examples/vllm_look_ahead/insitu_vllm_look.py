"""Taps in a model that somebody else compiles once, caches on disk and runs again elsewhere. Knows nothing of vLLM.

What vLLM does to a graph is harder than what `torch.compile` does in one process: it drops all guards, saves the graph,
and runs it in the next process with another model object. So whatever the graph reads or writes is reached through the
module that it is the forward of (`root.insitu_look`), never through a closure or a global: those are pickled with the
graph, and it would write into a copy that nobody reads. And since a graph that comes out of a cache may be that of
other taps, each run says which plan it was traced for (`Look.traced`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import nn

from insitu.sites.site import Site
from insitu.slabs.graph import COUNT, STAMP, GraphSlabs
from insitu.slabs.slab import NEVER, ControlBlock, Plan
from insitu.taps.forwards import forward_of, give_forward
from insitu.taps.graph import Desk, Kept, Sheet, traced_forward
from insitu.taps.graph_ops import running

COUNTER: Final = "insitu_fired"
"""Buffer of a hooked layer: how often its hook ran."""


@dataclass(frozen=True)
class Asked:
    """What is to be tapped; crosses to the workers as text."""

    how: str
    """"" nothing; "hook": a counter in a forward hook; "taps": those of insitu."""
    canaries: tuple[int, ...] = ()
    """Layers that are stamped and summed up: what they return first."""
    rows: tuple[int, ...] = ()
    """Layers whose residual stream is kept row by row. Not the last."""
    operator: bool = False
    """Whether the first of `rows` is also handed to Python in the middle of the graph (`insitu::take_1`)."""
    max_rows: int = 64
    width: int = 0
    dtype: str = "float32"

    @property
    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Asked:
        told = json.loads(text)
        return cls(**{**told, "canaries": tuple(told["canaries"]), "rows": tuple(told["rows"])})

    @property
    def plan(self) -> Plan:
        """The same on every rank: a stage without a site never stamps it.

        A layer of vLLM returns (what its MLP adds, the stream before that), so that its own output is not the residual
        stream: the norm of the next layer adds them up and returns the sum second. Of a stage's last layer that is on
        the next stage.
        """
        names = [(f"L{layer}.mlp_out", f"layers.{layer}", layer, 0) for layer in self.canaries]
        names += [(f"L{layer}.resid_post", f"layers.{layer + 1}.input_layernorm", layer, 1) for layer in self.rows]
        sites = (Site(at, name, fqn, layer, index=index) for at, (name, fqn, layer, index) in enumerate(names))
        return Plan(tuple(sites), (), self.max_rows)

    @property
    def digest(self) -> str:
        """What has to be in the key of any cache of graphs: the plan, and how it is traced."""
        return f"{self.how}-{self.plan.digest}-{int(self.operator)}"


@dataclass(frozen=True)
class Batch:
    """Rows of one forward: consecutive tokens of each request, one request after the other."""

    requests: tuple[str, ...]
    first: tuple[int, ...]
    """Position of each request's first row."""
    num: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.num)


class Look:
    """Memory of the taps of one model, at one address from before the model is traced on; and what was read of it."""

    def __init__(self, asked: Asked, device: torch.device) -> None:
        plan = self.plan = asked.plan
        self.desk = Desk()
        self.memory = self.desk.memory = GraphSlabs(plan, device)
        self.trash = plan.num_slabs
        self.block = ControlBlock(device, plan.num_slabs)
        self.control = self.block.block
        shape = (plan.num_slabs + 1, plan.max_rows + 1, asked.width)
        dtype = getattr(torch, asked.dtype)
        with torch.inference_mode(False):
            self.traced = torch.full((1,), NEVER, dtype=torch.int64, device=device)
            dest = torch.arange(plan.max_rows, device=device)
            self.rows = {
                site.number: Kept(torch.zeros(shape, dtype=dtype, device=device), None, dest, asked.width, dtype)
                for site in plan.sites[len(asked.canaries) :]
            }
        self.plan_number = int(plan.digest[:15], 16)
        """A constant of the graph that is traced with this look."""
        self.measured = frozenset(list(self.rows)[:1] if asked.operator else [])
        self.present: tuple[int, ...] = ()
        """Sites that this stage has."""
        self.steps: list[dict[str, Any]] = []
        self.kept: dict[int, list[torch.Tensor]] = {site: [] for site in self.rows}
        self.num_taken = 0
        """How often the operator of the graph came back to Python."""
        self._rest()

    def _rest(self) -> None:
        """Let forwards that belong to no step, as those of a warm-up, write where nobody reads."""
        self.block.write(NEVER, self.trash, 0, 0, 0, self.trash)

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Be the step of one forward; read after it what its graph wrote."""
        number = len(self.steps)
        slab = number % self.plan.num_slabs
        self.traced.fill_(NEVER)
        self.block.write(number, slab, batch.num_rows, len(batch.requests), 0, slab)
        taken = self.num_taken
        with running(self._take, self._count):
            yield
        self._rest()
        words, num_sites = self.memory.words[slab].tolist(), len(self.plan.sites)
        self.steps.append(
            {
                **asdict(batch),
                "fired": [site for site in range(num_sites) if words[STAMP][site] == number],
                "count": [words[COUNT][site] for site in self.rows],
                "is_finite": bool(self.memory.canary[slab, list(self.present)].isfinite().all()),
                "plan": int(self.traced),
                "taken": self.num_taken - taken,
            }
        )
        for site, rows in self.kept.items():
            if words[STAMP][site] == number:
                rows.append(self.rows[site].values[slab, : batch.num_rows].clone())

    def _take(self, site: int, x: torch.Tensor, source: torch.Tensor | None) -> None:
        self.num_taken += 1

    def _count(self, site: int, chosen: torch.Tensor) -> None: ...


def install(root: nn.Module, asked: Asked, is_there: Callable[[nn.Module], bool]) -> Look | None:
    """Tap a model before it is traced. is_there: false of what only holds the place of a layer of another stage."""
    modules = {fqn: module for fqn, module in root.named_modules() if is_there(module)}
    if asked.how == "hook":
        for layer in asked.canaries:
            if (module := modules.get(f"layers.{layer}")) is not None:
                module.register_buffer(COUNTER, torch.zeros(1, dtype=torch.int64), persistent=False)
                module.register_forward_hook(_count_call)
    if asked.how != "taps":
        return None
    device = next(root.parameters()).device
    look = root.insitu_look = Look(asked, device)  # type: ignore[assignment]
    present = [site for site in look.plan.sites if site.fqn in modules]
    for site in present:
        module = modules[site.fqn]
        give_forward(module, traced_forward(forward_of(module), site, look.desk, only_full=False))
    look.present = tuple(site.number for site in present)
    give_forward(root, _entry(forward_of(root)))
    return look


def _count_call(module: nn.Module, args: Any, output: Any) -> None:
    getattr(module, COUNTER).add_(1)


def _entry(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that is traced: the model's own, with a sheet for its taps around it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        look = self.insitu_look
        sheet = look.desk.sheet = Sheet(look.desk, look.control, look.rows, look.measured)
        output = inner(self, *args, **kwargs)
        sheet.write()
        look.traced.fill_(look.plan_number)
        look.desk.sheet = None
        return output

    return forward


def counters(root: nn.Module) -> dict[int, int]:
    """Return how often the hook of each hooked layer ran."""
    found: Sequence[tuple[str, torch.Tensor]] = [
        (fqn, buffer) for fqn, buffer in root.named_buffers() if fqn.endswith(COUNTER)
    ]
    return {int(fqn.split(".")[1]): int(buffer) for fqn, buffer in found}
