"""Take the hidden states of each request of a batch while it generates.

python examples/05_generate.py
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import insitu
from insitu_collector import open_store

folder = Path(__file__).parent / "models" / "tiny-llama"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token="</s>")
model.generation_config.pad_token_id = tokenizer.pad_token_id
session = insitu.attach(
    model, to="file://./insitu-store", rules=[insitu.Rule(sites="L7.resid_post", requests="all", rows="last")]
)
model(torch.tensor([[1]]))  # a first step tells how wide rows are

prompts = ["Once there was a brave farmer", "One morning, Tom"]
with session.requests(["farmer", "tom"]):
    model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=8, do_sample=False)
print(session.close())

rows = open_store("insitu-store").table("captures").select(["step_id", "request", "position"])
print(rows.group_by("request").aggregate([("position", "min"), ("position", "max"), ("step_id", "count")]).to_pylist())
