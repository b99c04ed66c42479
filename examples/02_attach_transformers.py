"""Observe a Hugging Face model while it generates, and find where its first NaN comes from.

python examples/02_attach_transformers.py && insitu stalls insitu-store
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import insitu

folder = Path(__file__).parent / "models" / "tiny-llama"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
session = insitu.attach(model, to="file://./insitu-store")

prompt = tokenizer("Once there was a brave farmer", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]))

with torch.no_grad():
    model.model.layers[5].mlp.down_proj.weight[3, 7] = float("nan")  # a broken weight, as a bad load leaves it
model(**prompt)
print(session.close())
