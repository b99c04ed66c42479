"""Train the checkpoint in `examples/models/tiny-llama`: a small Llama on the text of `models/corpus.py`.

Nine minutes on two cores, no network. Everything is seeded; the held-out perplexity is printed at the end.

    python examples/train_tiny_llama.py --minutes 9 --out examples/models/tiny-llama
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "models"))
from corpus import prompts, texts  # noqa: E402

VOCABULARY = 2048
CONTEXT = 128
BATCH = 8
HELD_OUT_SEED = 987_654
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def as_text(item: str | list[tuple[str, str]]) -> str:
    """Return one training document: a text as it is, talk in the form of the chat template."""
    if isinstance(item, str):
        return item
    return "".join(f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>" for question, answer in item)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((as_text(t) for t in itertools.islice(texts(seed), 8000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def packed(tokenizer: PreTrainedTokenizerFast, seed: int, num_texts: int) -> torch.Tensor:
    """Return token ids, shape [n, CONTEXT + 1]: documents joined as <s> text </s>, then cut."""
    documents = [as_text(text) for text in itertools.islice(texts(seed), num_texts)]
    ids: list[int] = []
    for encoded in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *encoded, tokenizer.eos_token_id]
    length = CONTEXT + 1
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def perplexity(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    with torch.inference_mode():
        losses = [model(input_ids=chunk, labels=chunk).loss.item() for chunk in torch.split(rows, 16)]
    return math.exp(sum(losses) / len(losses))


def train(model: LlamaForCausalLM, rows: torch.Tensor, minutes: float, seed: int) -> int:
    """Train for so many minutes of wall time with a cosine schedule over that time; return the step count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, fused=True, betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    began, done, step = time.monotonic(), 0.0, 0
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        done = (time.monotonic() - began) / (60 * minutes)
        if step % 100 == 0:
            print(f"step {step}  {100 * done:.0f} %  loss {loss.item():.3f}", flush=True)
    return step


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int) -> list[str]:
    made = []
    for prompt in prompts(11, n):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
        out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=1)
        made.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--threads", type=int, default=1, help="more only where nothing else runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "models" / "tiny-llama")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = train_tokenizer(options.seed)
    rows, held_out = packed(tokenizer, options.seed, 24_000), packed(tokenizer, HELD_OUT_SEED, 300)
    model = new_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows.numel():,} tokens", flush=True)
    steps = train(model, rows, options.minutes, options.seed)
    model.eval()
    print(f"{steps} steps, held-out perplexity {perplexity(model, held_out):.2f}")
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "prompts.txt").write_text("\n".join(prompts(options.seed, 400)) + "\n")
    print("\n".join(samples(model.float(), tokenizer, 3)))


if __name__ == "__main__":
    main()
