"""A vLLM that serves a block of requests when it is asked to; runs in vLLM's own environment (`vllm_overhead.py`)."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Final

from worker_loop import serve

LENGTHS: Final = (3, 5, 8, 13, 21, 34, 55, 89)
"""Of prompts."""


class Bench:
    """One engine: one rank, eager, in this process."""

    def __init__(self, model: str, num_tokens: int, extra: dict[str, str] | None) -> None:
        """extra: of each request, as `extra_args`."""
        import numpy as np
        from vllm import LLM, SamplingParams

        self._llm = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_batched_tokens=256,
            max_num_seqs=len(LENGTHS),
            enable_prefix_caching=False,
            disable_log_stats=True,
            skip_tokenizer_init=True,
        )
        draw = np.random.default_rng(0)
        self._prompts = [{"prompt_token_ids": draw.integers(5, 2048, length).tolist()} for length in LENGTHS]
        self._params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )

    def do_block(self) -> dict[str, Any]:
        """Serve every prompt once; return wall seconds, CPU-seconds of all threads, and the tokens."""
        cpu, began = time.process_time(), time.perf_counter()
        answers = self._llm.generate(self._prompts, self._params, use_tqdm=False)
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        return {"wall_s": wall_s, "cpu_s": cpu_s, "tokens": [list(each.outputs[0].token_ids) for each in answers]}

    def do_close(self) -> dict[str, Any]:
        self._llm.llm_engine.engine_core.shutdown()
        return {}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    serve(lambda: Bench(job["model"], job["num_tokens"], job["extra"]))
