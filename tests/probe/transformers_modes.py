"""Every way in which transformers runs a model that `docs/integrations.md` speaks of, run for real, once a process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import torch
import transformers as hf
from optimum.quanto.library.extensions.extension import get_extension
from transformers_kit import (
    EOS,
    GREEDY,
    PAD,
    WHOLE_OUTPUT,
    Run,
    attached,
    bloom,
    check_output,
    check_rows,
    llama,
    mistral,
    padded,
    prompts,
    same_rows,
    t5,
    whole,
)

Outcome = tuple[Run, int]
"""A run, and how many of its rows were found to be those of their requests."""


@dataclass(frozen=True)
class Mode:
    """One way to run a model."""

    title: str
    run: Callable[[], Outcome]
    note: str = ""
    """What a reader should know of it."""


def _generate(
    model: Any, lengths: Sequence[int] = (3, 9, 5), names: Sequence[str] = ("a", "b", "c"), **options: Any
) -> Outcome:
    """Run one batch of staggered prompts; what it was is told by what it returned."""
    asked = prompts(*lengths)
    with attached(model) as run, run.session.requests(names):
        output = model.generate(**padded(asked), **{**GREEDY, **options})
    run.sequences = dict(zip(names, whole(asked, output), strict=True))
    return run, check_rows(model, run)


def _refused(**options: Any) -> Outcome:
    """Run a batch whose rows nobody may be given."""
    model = llama()
    with attached(model) as run:
        model.generate(**padded(prompts(6)), **{**GREEDY, **options})
    return run, 0


def _several() -> Outcome:
    model, asked = llama(), prompts(3, 7)
    torch.manual_seed(1)
    with attached(model) as run:
        output = model.generate(**padded(asked), max_new_tokens=6, do_sample=True, num_return_sequences=2)
    found = whole([asked[0], asked[0], asked[1], asked[1]], output)
    run.sequences = {f"generate-0/{at // 2}#{at % 2}": each for at, each in enumerate(found)}
    return run, check_rows(model, run)


def _assisted() -> Outcome:
    return _generate(llama(), (6,), ("a",), assistant_model=llama(num_hidden_layers=1), max_new_tokens=12)


def _continued() -> Outcome:
    """Run two turns of one conversation: the second brings the cache of the first."""
    model, (first, more) = llama(), prompts(6, 4)
    with attached(model) as run, run.session.requests(["a"]):
        turn = model.generate(**padded([first]), **GREEDY, eos_token_id=63, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, torch.tensor([more])], 1)
        output = model.generate(ids, past_key_values=turn.past_key_values, **GREEDY, eos_token_id=63)
    run.sequences = {"a": output[0].tolist()}
    return run, check_rows(model, run)


def _encoder_decoder() -> Outcome:
    model, asked, names = t5(), prompts(5, 5), ["a", "b"]
    with attached(model) as run, run.session.requests(names):
        output = model.generate(**padded(asked), **GREEDY)
    run.sequences = dict(zip(names, whole([[PAD], [PAD]], output), strict=True))
    return run, check_rows(model, run, dict(zip(names, asked, strict=True)))


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Do what quanto would have a C++ compiler called for, for half a minute."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])


def _quantized() -> Outcome:
    """What a quantised cache gives back is another number, so rows are compared with those of the same run."""
    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=_unpack)
    model, asked, names = llama(), prompts(4, 12, 7), ["a", "b", "c"]
    options = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 16},
    }
    with attached(model) as run, run.session.requests(names):
        output = model.generate(**padded(asked), **GREEDY, **options, **WHOLE_OUTPUT)
    return run, check_output(run, output, names, asked)


def _beams() -> Outcome:
    """Beams change places, so rows are compared with those of the same search of each prompt by itself."""
    asked, options = prompts(3, 8), {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}

    def search(*which: Sequence[int]) -> Run:
        model = llama()
        with attached(model) as run:
            model.generate(**padded(which), **options)
        found: Run = run
        return found

    run = search(*asked)
    return run, sum(same_rows(run, f"generate-0/{at}", search(each), "generate-0/0") for at, each in enumerate(asked))


def _compiled() -> Outcome:
    config = hf.CompileConfig(backend="aot_eager", fullgraph=False)
    config._compile_all_devices = True
    found = _generate(llama(), cache_implementation="static", compile_config=config)
    torch.compiler.reset()
    return found


def _batching(asked: Sequence[Sequence[int]] = (), **options: Any) -> Outcome:
    model, asked = llama(), asked or prompts(3, 11, 2, 6)
    config = hf.ContinuousBatchingConfig(max_batch_tokens=8, num_blocks=32, page_size=4, **options)
    generation = hf.GenerationConfig(**GREEDY, eos_token_id=EOS, pad_token_id=PAD)
    with attached(model) as run:
        found = model.generate_batch(asked, generation_config=generation, continuous_batching_config=config)
    run.sequences = {name: [*each.prompt_ids, *each.generated_tokens] for name, each in found.items()}
    model.set_attn_implementation("sdpa")
    torch.compiler.reset()
    return run, check_rows(model, run)


def _batching_compiled() -> Outcome:
    config = hf.CompileConfig(backend="eager", fullgraph=False)
    return _batching(prompts(2, 3), varlen_compile_config=config)


def _early_exit() -> Outcome:
    return _refused(assistant_early_exit=2)


def _own_loop() -> Outcome:
    def loop(model: Any, input_ids: torch.Tensor, **_further: Any) -> torch.Tensor:
        for _ in range(3):
            input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], 1)
        return input_ids

    return _refused(custom_generate=loop)


MODES: Final = (
    Mode(
        "`generate`, left-padded batch, dynamic cache",
        lambda: _generate(llama()),
        "names by `session.requests`, else `generate-N/i`",
    ),
    Mode("… `num_return_sequences=2`", _several, "`#0`, `#1` after the name"),
    Mode("… `num_beams=3`", _beams, "a beam's rows are its prompt's; which beam is not told"),
    Mode("… `assistant_model`", _assisted, "drafts that are taken back have rows too; the later step counts"),
    Mode(
        "… `prompt_lookup_num_tokens`",
        lambda: _generate(llama(), (6,), ("a",), prompt_lookup_num_tokens=2, max_new_tokens=12),
        "as `assistant_model`",
    ),
    Mode("… `prefill_chunk_size`", lambda: _generate(llama(), prefill_chunk_size=4)),
    Mode("… `use_cache=False`", lambda: _generate(llama(), use_cache=False), "each step computes all rows again"),
    Mode("… a cache of an earlier call", _continued),
    Mode('… `cache_implementation="static"`', lambda: _generate(llama(), cache_implementation="static")),
    Mode("… static and compiled", _compiled),
    Mode("… sliding window, dynamic cache", lambda: _generate(mistral())),
    Mode("… sliding window, static cache", lambda: _generate(mistral(), cache_implementation="static")),
    Mode('… `cache_implementation="quantized"`', _quantized),
    Mode("… a model without position ids", lambda: _generate(bloom())),
    Mode("… encoder and decoder", _encoder_decoder, "the decoder's; the encoder runs outside of steps"),
    Mode("… `guidance_scale`", lambda: _refused(guidance_scale=1.5)),
    Mode("… `assistant_early_exit`", _early_exit),
    Mode("… `custom_generate`", _own_loop),
    Mode(
        "`generate_batch`, `ContinuousBatchingManager`",
        _batching,
        "names as transformers has them: `req_0`, or `request_id=`",
    ),
    Mode("… compiled (`varlen_compile_config`)", _batching_compiled),
)


@cache
def outcome(mode: Mode) -> Outcome:
    """Return what a mode gave; it runs once."""
    return mode.run()
