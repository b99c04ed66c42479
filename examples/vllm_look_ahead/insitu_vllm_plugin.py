"""What vLLM loads in each of its processes: taps a worker's model between its loading and its first trace.

Private parts of vLLM 0.32 that this holds on to: `Worker.load_model`; `GPUModelRunner._model_forward` and
`execute_model`, with `input_batch` and `query_start_loc`; `TorchCompileWithNoGuardsWrapper`, which has to be made again
since it compiles the forward that it found when the model was made.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from insitu_vllm_look import Asked, Batch, Look, counters, install

ASKED: Final = "INSITU_LOOK_ASKED"
OUT: Final = "INSITU_LOOK_OUT"
"""Folder for rows, a file a rank."""
PIECEWISE: Final = "INSITU_LOOK_PIECEWISE"
"""Set: compiled in pieces by vLLM's own backend, as on an accelerator; on the host vLLM leaves all to Inductor."""
UNKEYED: Final = "INSITU_LOOK_UNKEYED"
"""Set: taps although the key of the compile cache does not know of them. To show what comes of it."""
KEY: Final = "insitu"
"""In vLLM's `additional_config`, all of which is hashed into that key."""


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    from vllm.v1.worker.gpu_worker import Worker

    if os.environ.get(PIECEWISE):
        _compile_in_pieces()
    if os.environ.get(ASKED) and not hasattr(Worker, "insitu_asked"):
        Worker.insitu_asked = Asked.parse(os.environ[ASKED])
        load_model = Worker.load_model

        def load_and_tap(self: Any, **kwargs: Any) -> None:
            load_model(self, **kwargs)
            _tap(self, self.insitu_asked)

        Worker.load_model = load_and_tap


def _compile_in_pieces() -> None:
    """Let vLLM's own backend have the graph. One of its passes names operators of CUDA: it is left out, as on XPU."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: Any, vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        before = compilation.mode
        check(cls, vllm_config)
        if before == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.compile_sizes = before, []  # sizes: None only where no graphs are captured

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)
    FixFunctionalizationPass.__call__ = lambda self, graph: None


def _tap(worker: Any, asked: Asked) -> None:
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models.utils import PPMissingLayer

    told = (worker.vllm_config.additional_config or {}).get(KEY)
    if asked.how and told != asked.digest and not os.environ.get(UNKEYED):
        raise RuntimeError(f"insitu: additional_config has to say {KEY!r}: {asked.digest!r}, and says {told!r}")
    runner = worker.model_runner
    root = next(module for module in runner.model.modules() if isinstance(module, TorchCompileWithNoGuardsWrapper))
    look = install(root, asked, lambda module: not isinstance(module, PPMissingLayer))
    if look is not None and not root.do_not_compile:
        root.cleanup()
        with set_current_vllm_config(worker.vllm_config):
            TorchCompileWithNoGuardsWrapper.__init__(
                root, compile_prefix=root._compile_prefix, is_encoder=root._is_encoder
            )
    worker.insitu_root, worker.insitu_watch = root, Watch(runner, root, look)


class Watch:
    """Counts what the runner executes, makes each forward a step, and says which rows are whose."""

    def __init__(self, runner: Any, root: Any, look: Look | None) -> None:
        self.num_executed = 0
        self.hooks: list[dict[int, int]] = []
        """By forward: how often each hook ran in it."""
        self.look, self._runner, self._root = look, runner, root
        self._execute, self._forward = runner.execute_model, runner._model_forward
        runner.execute_model, runner._model_forward = self.execute, self.forward

    def execute(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_executed += scheduled.total_num_scheduled_tokens > 0
        return self._execute(scheduled, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.look is not None:
            with self.look.step(self._batch()):
                return self._forward(*args, **kwargs)
        before = counters(self._root)
        output = self._forward(*args, **kwargs)
        self.hooks.append({layer: num - before[layer] for layer, num in counters(self._root).items()})
        return output

    def _batch(self) -> Batch:
        """Read whose rows come: after `_prepare_inputs`, which may have reordered the requests."""
        runner = self._runner
        requests = tuple(runner.input_batch.req_ids)
        starts = runner.query_start_loc.np[: len(requests) + 1]
        first = runner.input_batch.num_computed_tokens_cpu[: len(requests)]
        return Batch(requests, tuple(map(int, first)), tuple(map(int, np.diff(starts))))


class Extension:
    """What `worker_extension_cls` adds to each worker."""

    def insitu_look_report(self: Any) -> str:
        """Write the rows to a file and return the rest as JSON."""
        from vllm.compilation.counter import compilation_counter as counter

        watch, compilation = self.insitu_watch, self.vllm_config.compilation_config
        look: Look | None = watch.look
        if look is not None:
            rows = {f"site_{site}": _joined(parts) for site, parts in look.kept.items() if parts}
            np.savez(Path(os.environ[OUT]) / f"rank_{self.rank}.npz", **rows)
        return json.dumps(
            {
                "rank": self.rank,
                "mode": compilation.mode.name,
                "pieces": counter.num_piecewise_graphs_seen,
                "loaded": counter.num_aot_artifacts_loaded,
                "saved": counter.num_aot_artifacts_saved,
                "artifacts": counter.num_compiled_artifacts_saved,
                "compile_s": round(compilation.compilation_time, 1),
                "executed": watch.num_executed,
                "hooks": watch.hooks,
                "present": look.present if look else [],
                "plan": look.plan_number if look else None,
                "steps": look.steps if look else [],
            }
        )


def _joined(parts: Any) -> Any:
    import torch

    return torch.cat(parts).float().numpy()
