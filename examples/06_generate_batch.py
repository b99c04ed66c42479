"""See which requests share a step of continuous batching.

python examples/06_generate_batch.py
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import insitu
from insitu_collector import open_store

folder = Path(__file__).parent / "models" / "tiny-llama"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
session = insitu.attach(model, to="file://./insitu-store")

prompts = ["Once there was a brave farmer", "One morning, Tom", "The cat"]
model.generate_batch(
    [tokenizer(prompt)["input_ids"] for prompt in prompts],
    generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
    continuous_batching_config=ContinuousBatchingConfig(max_batch_tokens=16, num_blocks=16),
)
print(session.close())

for step in open_store("insitu-store").table("steps").to_pylist():
    print(step["step_id"], {rows["request"]: rows["count"] for rows in step["rows"]})
