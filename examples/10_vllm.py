"""Run vLLM under insitu, in Python: where the time of each stage went, and the rows of one request.

python examples/10_vllm.py
"""

import os
from pathlib import Path

os.environ["INSITU_ENABLED"] = "1"  # before vLLM is imported: it loads the plug-in, which does nothing without this
os.environ["INSITU_TO"] = "file://./insitu-store"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM's core in this process, whose end is then the store's
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; counts on a host alone

import pyarrow.compute as pc
from vllm import LLM, SamplingParams

from insitu_collector import open_store

PROMPTS = ["The cat", "One morning, Tom", "Once there was a brave farmer who lived by the river and"]


def main() -> None:
    model = str(Path(__file__).parent / "models" / "tiny-llama")
    llm = LLM(model, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=8)
    params = [SamplingParams(temperature=0, max_tokens=8) for _ in PROMPTS]
    params[-1].extra_args = {"insitu": "capture=rows"}  # the last one asks for its rows
    for answer in llm.generate(PROMPTS, params, use_tqdm=False):
        print(f"{answer.request_id}: {answer.prompt} ...{answer.outputs[0].text}")
    llm.llm_engine.engine_core.shutdown()  # what was recorded is durable from here on

    store = open_store("insitu-store")
    spent = store.intervals()
    spent = spent.append_column("ns", pc.subtract(spent["t1_ns"], spent["t0_ns"])).filter(pc.field("stage") >= 0)
    by_class = spent.group_by(["stage", "ledger_class"]).aggregate([("ns", "sum"), ("ns", "count")])
    for row in by_class.sort_by([("stage", "ascending"), ("ns_sum", "descending")]).to_pylist():
        print(f"stage {row['stage']}: {row['ledger_class']:<14} {row['ns_sum'] / 1e6:9.1f} ms in {row['ns_count']}")
    for request in pc.unique(store.captures(columns=["request"])["request"]).to_pylist():
        print(f"{request}: L3.resid_post {store.tensor((request, 'L3.resid_post')).shape}")


if __name__ == "__main__":
    main()
