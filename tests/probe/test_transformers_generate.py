"""`generate` and continuous batching: each row is its request's, at its position, in each mode of transformers."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from transformers_kit import (
    EOS,
    GREEDY,
    PAD,
    WHOLE_OUTPUT,
    attached,
    check_output,
    check_rows,
    llama,
    padded,
    prompts,
    whole,
)
from transformers_modes import MODES, Mode, outcome

import insitu
from insitu.testing import Recording


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.title)
def test_rows_are_their_requests_in_every_mode(mode: Mode) -> None:
    run, num_checked = outcome(mode)
    assert run.fired == run.num_sites
    if not num_checked:
        assert not any(step["rows"] for step in run.steps)
        assert len([line for line in run.said if "nobody's" in line]) == 1
        return
    assert run.said == []
    for name, tokens in run.sequences.items():
        found = {position for _, request, _, position, _ in run.captured(run.site) if request == name}
        assert found >= set(range(len(tokens) - 1)), f"{name}: all of its tokens but the last, which is never fed"


def _ends_second(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Say that the second sequence is over once it has two new tokens."""
    return torch.tensor([False, input_ids.shape[1] >= 8 + 2, False])


def test_a_sequence_that_is_over_has_no_rows_any_more() -> None:
    model, asked = llama(), prompts(3, 8, 5)
    with attached(model) as run, run.session.requests(["a", "b", "c"]):
        output = model.generate(**padded(asked), **GREEDY, eos_token_id=62, stopping_criteria=[_ends_second])
    run.sequences = dict(zip("abc", whole(asked, output), strict=True))
    run.sequences["b"] = run.sequences["b"][: 8 + 2]
    assert check_rows(model, run) == sum(len(each) - 1 for each in run.sequences.values()) + 6 + 2 + 6
    assert [step["num_rows"] for step in run.steps][1:] == [3] * 5, "its row is there, among those of others"
    assert [len(step["rows"]) for step in run.steps] == [3, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("num_rows", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_captured_rows_are_the_hidden_states_that_generate_returns(num_rows: int) -> None:
    order = torch.Generator().manual_seed(num_rows)
    model, num_checked, number = llama(eos_token_id=63), 0, 0
    model.generation_config.eos_token_id = None
    while num_checked < num_rows:
        lengths = torch.randint(1, 40, (int(torch.randint(1, 9, (), generator=order)),), generator=order).tolist()
        asked, number = prompts(*lengths, seed=number), number + 1
        names = [f"{number}-{at}" for at in range(len(asked))]
        new = int(torch.randint(1, 12, (), generator=order))
        with attached(model, max_rows=512) as run, run.session.requests(names):
            output = model.generate(**padded(asked), max_new_tokens=new, do_sample=False, **WHOLE_OUTPUT)
        num_checked += check_output(run, output, names, asked)


def test_tokens_are_the_same_with_and_without() -> None:
    asked, config = prompts(3, 9, 5), hf.GenerationConfig(**GREEDY, eos_token_id=EOS, pad_token_id=PAD)
    bare, observed = llama(), llama()
    batching = hf.ContinuousBatchingConfig(max_batch_tokens=8, num_blocks=32, page_size=4)

    def tokens(model: Any) -> Any:
        one = model.generate(**padded(asked), **GREEDY)
        many = model.generate_batch(asked, generation_config=config, continuous_batching_config=batching)
        return one.tolist(), {name: each.generated_tokens for name, each in many.items()}

    with attached(observed):
        found = tokens(observed)
    assert found == tokens(bare)


def test_two_models_in_one_call_keep_their_rows_apart() -> None:
    model, draft = llama(), llama(num_hidden_layers=1)
    drafts = Recording()
    other = insitu.attach(draft, to=drafts)
    with attached(model) as run, run.session.requests(["a"]):
        output = model.generate(**padded(prompts(6)), **GREEDY, assistant_model=draft)
    other.close()
    run.sequences = {"a": output[0].tolist()}
    assert check_rows(model, run) > 0
    named = {entry["request"] for step in drafts.rows("steps") for entry in step["rows"] or ()}
    assert named and all(name == "a" for name in named), "a draft is made for the request that is under way"


def test_names_reach_calls_that_are_awaited() -> None:
    model = llama()

    async def serve(session: insitu.Session) -> None:
        with session.requests(["awaited"], capture=True):
            await asyncio.to_thread(model.generate, **padded(prompts(4)), **GREEDY)

    with attached(model) as run:
        asyncio.run(serve(run.session))
    assert {name for name, *_ in run.rows} == {"awaited"}


def test_a_forward_of_ones_own_is_of_the_requests_around_it() -> None:
    model, asked = llama(), prompts(2, 6)
    with attached(model) as run, torch.no_grad():
        with run.session.requests(["a", "b"]):
            inputs = padded(asked)
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            model(**inputs, position_ids=positions)
        model(**inputs)
    run.sequences = dict(zip("ab", asked, strict=True))
    assert check_rows(model, run) == 2 * (2 + 6), "logits of every token, too"
    assert [bool(step["rows"]) for step in run.steps] == [True, False]


def test_a_wrong_number_of_names_is_said_and_others_are_taken() -> None:
    model = llama()
    with attached(model) as run, run.session.requests(["only"]):
        model.generate(**padded(prompts(3, 4)), **GREEDY)
    assert {name for name, *_ in run.rows} == {"generate-0/0", "generate-0/1"}
    (line,) = run.said
    assert "session.requests names 1, and there are 2 prompts" in line


@pytest.mark.parametrize("wrong", ["abc", 3, [1, 2]])
def test_what_is_no_list_of_names_is_refused(wrong: Any) -> None:
    with attached(llama()) as run, pytest.raises(ValueError, match="is no list of names"), run.session.requests(wrong):
        pass


def test_a_row_map_by_hand_means_what_it_did(insitu_records: Recording) -> None:
    model = llama()
    session = insitu.attach(model, to=insitu_records, rules=[insitu.Rule(sites="logits", requests="all")])
    with torch.no_grad():
        model(torch.tensor([[7, 8]]))
        with session.step(rows=[insitu.Rows("x", 0, 3, 4), insitu.Rows("y", 3, 2, 0)]):
            expected = model(torch.tensor([[7, 8, 9, 10, 11]])).logits[0]
    session.close()
    rows = insitu_records.rows("captures")
    assert [(row["request"], row["row"], row["position"]) for row in rows] == [
        *(("x", at, 4 + at) for at in range(3)),
        *(("y", 3 + at, at) for at in range(2)),
    ]
    assert [row["data"] for row in rows] == [each.numpy().tobytes() for each in expected]


def test_an_unknown_version_is_said_and_the_model_runs_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "7.0.0")
    model = llama()
    with attached(model) as run:
        model.generate(**padded(prompts(3, 4)), **GREEDY)
    assert [step["rows"] for step in run.steps] == [None] * 6
    assert len(run.said) == 1
    assert "7.0.0 is none of 5.x" in run.said[0]


def test_a_model_without_known_layers_is_said_and_runs_on(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(3)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "intermediate_size": 32}
    model = hf.MambaForCausalLM(hf.MambaConfig(**sizes, time_step_rank=4, pad_token_id=PAD, eos_token_id=EOS)).eval()
    bare = model.generate(torch.tensor([[7, 8, 9]]), **GREEDY)
    with caplog.at_level(logging.WARNING, "insitu"):
        session = insitu.attach(model, to=insitu_records)
    assert [line for line in caplog.messages if "no layers" in line] != []
    assert torch.equal(model.generate(torch.tensor([[7, 8, 9]]), **GREEDY), bare)
    session.close()
    assert all(step["rows"] is None for step in insitu_records.rows("steps"))


def test_another_plug_in_on_the_same_hooks_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    generate = hf.GenerationMixin.generate

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("generate")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(hf.GenerationMixin, "generate", theirs)
    model = llama()
    forward = model.forward

    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append("forward")
        return forward(*args, **kwargs)

    model.forward = around
    with attached(model) as run, run.session.requests(["a"]):
        output = model.generate(**padded(prompts(4)), max_new_tokens=2, do_sample=False)
        monkeypatch.setattr(hf.GenerationMixin, "generate", theirs)
        model.generate(**padded(prompts(4)), max_new_tokens=2, do_sample=False)
    run.sequences = {"a": output[0].tolist()}
    assert check_rows(model, run) > 0
    assert calls.count("generate") == 2
    assert calls.count("forward") >= 5
    assert model.forward is around, "detached, theirs is as it was"
