"""A process of vLLM for the tests: serves batches of requests, and writes down what it was asked and what it answered.

    VLLM_PYTHON tests/vllm/vllm_runs.py PLAN.json OUT.json

Runs in vLLM's own environment, so it imports nothing of the tests.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def cache_keys(worker: Any) -> dict[str, Any]:
    """Return what a worker's compile cache is asked for, as it is and without what insitu put in."""
    config = worker.vllm_config
    told = dict(config.additional_config)
    key = config.compute_hash()
    config.additional_config = {}
    bare = config.compute_hash()
    config.additional_config = told
    return {"told": told, "key": key, "bare": bare}


def main(plan_at: str, out_at: str) -> None:
    from vllm import LLM, SamplingParams

    plan = json.loads(Path(plan_at).read_text())
    llm = LLM(disable_log_stats=True, **plan["engine"])
    requests: list[dict[str, Any]] = []
    for batch in plan["batches"]:
        params = [
            SamplingParams(temperature=0, max_tokens=each["max_tokens"], ignore_eos=True, detokenize=False, extra_args=each["extra"])
            for each in batch
        ]
        answers = llm.generate([{"prompt_token_ids": each["prompt"]} for each in batch], params, use_tqdm=False)
        for each, answer in zip(batch, answers, strict=True):
            requests.append({**each, "name": answer.request_id, "output": list(answer.outputs[0].token_ids)})
    keys = llm.collective_rpc(cache_keys) if plan.get("keys") else []
    Path(out_at).write_text(json.dumps({"requests": requests, "keys": keys}))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
