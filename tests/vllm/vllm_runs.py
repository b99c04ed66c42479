"""A process of vLLM for the tests: serves batches of requests, and writes down what it was asked and what it answered.

    VLLM_PYTHON tests/vllm/vllm_runs.py PLAN.json OUT.json

Runs in vLLM's own environment, so it imports nothing of the tests. Engines run one after the other, each in a process
of its own, forked from this one: vLLM takes long to import, and makes one engine a process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def cache_keys(worker: Any) -> dict[str, Any]:
    """Return what a worker's compile cache is asked for, as it is and without what insitu put in; and what it gave."""
    from vllm.compilation.counter import compilation_counter as counter

    config = worker.vllm_config
    told = dict(config.additional_config)
    key = config.compute_hash()
    config.additional_config = {}
    bare = config.compute_hash()
    config.additional_config = told
    return {"told": told, "key": key, "bare": bare, "loaded": counter.num_aot_artifacts_loaded}


def other_version() -> None:
    """Let vLLM be of a version that nobody knows."""
    import vllm

    vllm.__version__ = "9.99.0"


def other_plugin() -> None:
    """Be another plug-in that holds on to the runner: as those do that capture by themselves."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    inner = GPUModelRunner._model_forward

    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs)

    GPUModelRunner._model_forward = model_forward


def in_pieces() -> None:
    """Let vLLM's own backend have the graph, which it saves: as on an accelerator; on a host it leaves all to Inductor.

    One of its passes names operators of CUDA: it is left out, as vLLM does on other devices.
    """
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


def broken_row_maps() -> None:
    """Let the plug-in itself be broken."""
    from insitu.vllm import worker

    broken: Any = worker

    def row_map(*args: Any) -> Any:
        raise LookupError("broken on purpose")

    broken.row_map = row_map


BEFORE: Mapping[str, Callable[[], None]] = {
    each.__name__: each for each in (other_version, other_plugin, in_pieces, broken_row_maps)
}


def serve(plan: dict[str, Any]) -> dict[str, Any]:
    """Run one engine; return its requests with their answers."""
    from vllm import LLM, SamplingParams

    os.environ.update(plan["environment"])
    if plan["before"]:
        BEFORE[plan["before"]]()
    llm = LLM(disable_log_stats=True, **plan["engine"])
    requests: list[dict[str, Any]] = []
    for batch in plan["batches"]:
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=each["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                extra_args=each["extra"],
            )
            for each in batch
        ]
        answers = llm.generate([{"prompt_token_ids": each["prompt"]} for each in batch], params, use_tqdm=False)
        for each, answer in zip(batch, answers, strict=True):
            requests.append({**each, "name": answer.request_id, "output": list(answer.outputs[0].token_ids)})
    keys = llm.collective_rpc(cache_keys) if plan["keys"] else []
    llm.llm_engine.engine_core.shutdown()
    return {"requests": requests, "keys": keys}


def serve_into(plan: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(serve(plan)))


def main(plans_at: str, out_at: str) -> None:
    import vllm  # noqa: F401  (once for all; nothing is computed here: what threads do does not survive a fork)
    from vllm import LLM  # noqa: F401

    answered = []
    for plan in json.loads(Path(plans_at).read_text()):
        print(f"=== {plan['name']}", flush=True)
        out = Path(f"{plan['name']}.json")
        child = multiprocessing.get_context("fork").Process(target=serve_into, args=(plan, out))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{plan['name']} ended with {child.exitcode}")
        answered.append(json.loads(out.read_text()))
    Path(out_at).write_text(json.dumps(answered))


if __name__ == "__main__":
    main(*sys.argv[1:])
