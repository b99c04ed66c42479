"""Taps in a model that vLLM compiles: put on before it is traced, in the one graph that it makes.

vLLM drops all guards, may save the graph, and runs it in the next process with another model object. So what the graph
reads or writes is reached through the module that it is the forward of (`root.insitu_graph`), never through a closure
or a global: those are pickled with it, and it would write into a copy that nobody reads. And a graph that comes out of
a cache may be that of other taps: a digest of these is in the cache's key, and each run writes a number of its plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from insitu.identity import package_version
from insitu.slabs.graph import GraphSlabs
from insitu.slabs.slab import NEVER
from insitu.taps.compiled import count_untaken
from insitu.taps.forwards import forward_of, give_forward
from insitu.taps.graph import Desk, Kept, Sheet, kept
from insitu.vllm.hooks import NotThere, say

if TYPE_CHECKING:
    from insitu.taps.observer import Observer

KEY: Final = "insitu"
"""In vLLM's `additional_config`, all of which is hashed into the key of its compile cache."""
FIXED: Final = "vLLM has compiled this model into one graph; INSITU_VLLM_ROWS says at its start which rows may be taken"


class OneGraph:
    """Memory of the taps in one graph, at one address from before it is traced on."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        """Whose forward is compiled."""
        self.desk = Desk()
        self.control = torch.empty(0)
        self.rows: dict[int, Kept] = {}
        self.traced = torch.empty(0)
        """Which plan the graph that ran was traced for."""
        self.number = NEVER
        """Of this plan; a constant of the graph."""
        self._observer: Observer | None = None
        self._is_foreign = False

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> OneGraph | None:
        """Return the graph that vLLM is going to make of a model, None where it runs eagerly. Raises NotThere."""
        from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
        from vllm.config import CUDAGraphMode

        roots = [m for m in model.modules() if isinstance(m, TorchCompileWithNoGuardsWrapper) and not m.do_not_compile]
        if not roots:
            return None
        if len(roots) > 1:
            raise NotThere(f"vLLM compiles {len(roots)} parts of this {type(model).__name__} by themselves")
        if config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE):
            raise NotThere("vLLM captures CUDA graphs, in which this was never tested; --enforce-eager shows tensors")
        if not isinstance(config.additional_config, dict):
            raise NotThere("additional_config is no dictionary, so that the compile cache cannot be told of taps")
        return cls(roots[0])

    def enter(self, observer: Observer) -> None:
        """Let the forward of the root be one that writes what an observer's taps see. Before it is traced."""
        plan, device = observer.plan, observer.device
        self._observer, self.control = observer, observer.control.block
        self.desk = observer.taps.desk
        self.desk.memory = GraphSlabs(plan, device)
        self.rows = {site: kept(area) for site, area in observer.in_force.rings().items()}
        with torch.inference_mode(False):
            self.traced = torch.full((1,), NEVER, dtype=torch.int64, device=device)
        self.number = int(plan.digest[:15], 16)
        observer.changes.fixed = FIXED
        self.rest()
        root: Any = self.root
        root.insitu_graph = self
        give_forward(root, _entry(forward_of(root)))

    def begin(self) -> None:
        """Tell the graph which step it runs next: the one that the observer has begun."""
        assert self._observer is not None, "a graph that runs has taps"
        observer, record = self._observer, self._observer.current.record
        if record is None or record.slab is None:
            return
        record.in_graph = True
        variant = record.variant
        count_untaken(record)
        if record.row_slab is not None:
            record.variant = variant
        elif record.in_force.row_slabs is not None:  # it writes rows in any case
            record.in_force.aim_at_trash()
        self.traced.fill_(NEVER)
        observer.write_control(record)

    def end(self) -> None:
        """Keep nothing of a graph of another plan: its sites are others. Before the observer ends the step."""
        assert self._observer is not None, "a graph that runs has taps"
        record = self._observer.current.record
        if record is not None and record.in_graph and int(self.traced) != self.number:
            record.in_graph = False
            if not self._is_foreign:
                self._is_foreign = True
                say("vLLM runs a graph that was compiled for other taps; tensors are not observed")
        self.rest()

    def rest(self) -> None:
        """Let forwards that belong to no step, as those of a warm-up, write where nobody reads."""
        assert self._observer is not None, "a graph that runs has taps"
        trash = self._observer.plan.num_slabs
        self._observer.control.write(NEVER, trash, 0, 0, 0, 0)


def put_into(graph: OneGraph, observer: Observer, config: Any) -> None:
    """Let the forward that vLLM compiles be one with taps. Raises NotThere; the root is then as it was."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper as Wrapper
    from vllm.config import set_current_vllm_config

    root: Any = graph.root
    taken = set(inspect.signature(Wrapper.__init__).parameters)
    if taken != {"self", "compile_prefix", "is_encoder"} or not hasattr(root, "_compile_prefix"):
        raise NotThere(f"{Wrapper.__name__} of this vLLM is made otherwise than was known")
    graph.enter(observer)
    config.additional_config = {**config.additional_config, KEY: f"{observer.plan.digest}-{package_version()}"}
    root.cleanup()
    with set_current_vllm_config(config):
        Wrapper.__init__(root, compile_prefix=root._compile_prefix, is_encoder=root._is_encoder)


def _entry(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that is traced: the model's own, with a sheet for its taps around it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        graph = self.insitu_graph
        sheet = graph.desk.sheet = Sheet(graph.desk, graph.control, graph.rows)
        output = inner(self, *args, **kwargs)
        sheet.write()
        graph.traced.fill_(graph.number)
        graph.desk.sheet = None
        return output

    return forward
