"""Small random models of transformers, what a run of one gave, and what a request's rows are when it runs alone.

A row is right if it is the one that its request has at its position when the request is alone, unpadded and without a
cache: whatever a batch, a cache or a schedule does to it, a map that is off by one shows another.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from small_models import DECODER, T5

import insitu
from insitu.session.live import Session
from insitu.testing import Recording

EOS, PAD = 5, 0
TEXT: Final = {**DECODER, "eos_token_id": EOS, "bos_token_id": 1, "max_position_embeddings": 128}
WHOLE_OUTPUT: Final = {"output_hidden_states": True, "output_logits": True, "return_dict_in_generate": True}
GREEDY: Final[Mapping[str, Any]] = {"max_new_tokens": 6, "do_sample": False}


def llama(**changes: Any) -> Any:
    """Return a small Llama with random weights, always the same."""
    torch.manual_seed(7)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, **changes})).eval()


def mistral() -> Any:
    """Return a small Mistral that sees no further back than four tokens."""
    torch.manual_seed(8)
    return hf.MistralForCausalLM(hf.MistralConfig(**TEXT, sliding_window=4)).eval()


def bloom() -> Any:
    """Return a small Bloom: it takes no positions, and tells them from the mask."""
    torch.manual_seed(9)
    sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 4}
    return hf.BloomForCausalLM(hf.BloomConfig(**sizes, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=1)).eval()


def t5() -> Any:
    """Return a small T5: an encoder, and a decoder that generates."""
    torch.manual_seed(10)
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5, eos_token_id=EOS, pad_token_id=PAD)).eval()


def prompts(*lengths: int, seed: int = 3) -> list[list[int]]:
    """Return prompts of random tokens, none of them special."""
    order = np.random.default_rng(seed)
    return [order.integers(6, 64, length).tolist() for length in lengths]


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return prompts as one left-padded batch."""
    most = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (most - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (most - len(each)) + [1] * len(each) for each in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Run:
    """What one run of a mode left."""

    records: Recording
    session: Session
    site: str
    """Whose rows are taken beside logits: what the second layer returns."""
    num_forwards: int = 0
    fired: int = 0
    num_sites: int = 0
    sequences: dict[str, list[int]] = field(default_factory=dict)
    """By request: its tokens in the end, without padding, as it is checked against running alone."""
    said: list[str] = field(default_factory=list)

    @property
    def sites(self) -> tuple[str, str]:
        return self.site, "logits"

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.records.rows("steps")[1:]

    @property
    def rows(self) -> list[tuple[str, int, int, str, int]]:
        """Return every entry of the row maps: request, row, position, phase and sampled row of its last token."""
        return [
            (entry["request"], entry["row"], entry["position"], entry["phase"], entry["sample_row"])
            for step in self.steps
            for entry in step["rows"] or ()
        ]

    def captured(self, site: str) -> list[tuple[int, str | None, int, int, NDArray[np.float32]]]:
        """Return a site's rows: step, request, row, position, values."""
        number = next(each["site"] for each in self.records.rows("sites") if each["name"] == site)
        return [
            (each["step_id"], each["request"], each["row"], each["position"], np.frombuffer(each["data"], np.float32))
            for each in self.records.rows("captures", site=number)
        ]


class _Said(logging.Handler):
    """Keeps what insitu says in its log."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


@contextmanager
def attached(model: Any, **options: Any) -> Any:
    """Take the rows of one layer and logits, and yield the run. The model has run before, so that widths are known.

    Attach to a model that knows its widths already, count its forwards, and yield the run."""
    records, said = Recording(), list[str]()
    log, handler = logging.getLogger("insitu"), _Said(said)
    log.addHandler(handler)
    site = "decoder.L1.resid_post" if model.config.is_encoder_decoder else "L1.resid_post"
    rules = [insitu.Rule(sites=name, requests="all") for name in (site, "logits")]
    session = insitu.attach(model, to=records, rules=rules, overhead_budget=1.0, **options)
    run = Run(records, session, site, said=said)
    first = {"input_ids": torch.tensor([[9, 8]])}
    if model.config.is_encoder_decoder:
        first["decoder_input_ids"] = torch.tensor([[0]])
    with torch.no_grad():
        model(**first)
    handle = (model.get_decoder() or model).register_forward_pre_hook(lambda *_: _count(run))
    try:
        yield run
    finally:
        handle.remove()
        run.fired, run.num_sites = session.coverage().fired, len(session.sites())
        session.close()
        log.removeHandler(handler)


def _count(run: Run) -> None:
    if not torch.compiler.is_compiling():
        run.num_forwards += 1


def alone(model: Any, tokens: Sequence[int], encoded: Sequence[int] = ()) -> list[NDArray[np.float32]]:
    """Return a sequence's rows when it runs alone, whole, in the order of `Run.sites`: [len(tokens), width] each."""
    inputs = {"input_ids": torch.tensor([list(tokens)])}
    if encoded:
        inputs = {"input_ids": torch.tensor([list(encoded)]), "decoder_input_ids": inputs["input_ids"]}
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True, use_cache=False)
    hidden = found.decoder_hidden_states if encoded else found.hidden_states
    return [hidden[2][0].numpy(), found.logits[0].numpy()]


def same_rows(run: Run, request: str, other: Run, of: str) -> int:
    """Check that a request's rows are those that `of` has in another run, step by step; return how many they are."""
    num_checked = 0
    for site in run.sites:
        found, expected = (
            [(position, values) for _, name, _, position, values in each.captured(site) if name == wanted]
            for each, wanted in ((run, request), (other, of))
        )
        assert [position for position, _ in found] == [position for position, _ in expected], site
        for (_, values), (_, truth) in zip(found, expected, strict=True):
            np.testing.assert_allclose(values, truth, atol=2e-5, err_msg=f"{site} of {request}")
        num_checked += len(found)
    return num_checked


def check_rows(model: Any, run: Run, encoded: Mapping[str, Sequence[int]] | None = None) -> int:
    """Check every captured row with a name against its request alone; return how many there were.

    Of a position that was tried several times (drafts) the last try counts.
    """
    truth = {name: alone(model, tokens, (encoded or {}).get(name, ())) for name, tokens in run.sequences.items()}
    mapped = {step["step_id"] for step in run.steps if step["rows"] is not None}
    num_checked = 0
    for at, site in enumerate(run.sites):
        rows = [
            (request, position, values) for step, request, _, position, values in run.captured(site) if step in mapped
        ]
        for (request, position), values in {(request, position): values for request, position, values in rows}.items():
            assert request in truth, f"{site}: a row is of {request!r}, which nobody asked for"
            if position < len(truth[request][at]):
                np.testing.assert_allclose(values, truth[request][at][position], atol=2e-5, err_msg=f"{site} {request}")
                num_checked += 1
    return num_checked


def positions_of(run: Run, site: str, request: str) -> list[int]:
    """Return at which positions a request's rows were taken, sorted, each as often as it was."""
    return sorted(position for _, name, _, position, _ in run.captured(site) if name == request)


def check_output(run: Run, output: Any, names: Sequence[str], prompts: Sequence[Sequence[int]]) -> int:
    """Check every captured row, bit for bit, against what `generate` itself returned of the same step; return how many.

    output: of left-padded prompts, with hidden states and logits, of which no sequence has ended before the others.
    """
    width, num_checked = max(map(len, prompts)), 0
    first = run.steps[0]["step_id"]
    for site in run.sites:
        seen = set()
        for step, request, row, position, values in run.captured(site):
            at = step - first
            expected = output.hidden_states[at][2].flatten(0, 1) if site == run.site else output.logits[at]
            num_tokens = len(expected) // len(prompts)
            of, token = divmod(row, num_tokens)
            before = len(prompts[of]) - 1 + at if site == "logits" or at else token - (width - len(prompts[of]))
            assert (request, position) == (names[of], before), f"{site} of step {step}, row {row}"
            assert np.array_equal(values, expected[row].numpy()), f"{site} of step {step}, row {row}"
            seen.add((request, position))
        num_steps = len(output.logits)
        lengths = [len(each) + num_steps - 1 if site == run.site else num_steps for each in prompts]
        assert len(seen) == sum(lengths), f"{site}: every row of every request, once"
        num_checked += len(seen)
    return num_checked


def whole(prompts: Sequence[Sequence[int]], output: torch.Tensor, width: int = -1) -> list[list[int]]:
    """Return each sequence that `generate` returned, without padding: its prompt, and what is new up to its end.

    width: of the prompts as they were padded; the longest if not told.
    """
    width = max(map(len, prompts)) if width < 0 else width
    found = []
    for prompt, row in zip(prompts, output.tolist(), strict=True):
        new = row[width:]
        found.append([*prompt, *(new[: new.index(EOS) + 1] if EOS in new else new)])
    return found
