"""What a request body may say, and what is answered when it says something else."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_engine.completions import (
    Answer,
    CompletionRequest,
    error_body,
    make_request,
    opts_in,
    parse_body,
)
from insitu_engine.errors import RequestError


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": [1, 2, 3], **fields}).encode()


def refused(data: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_body(data)
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -3}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": 5}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"stream": "yes"}, "stream"),
        ({"stop": 5}, "stop"),
        ({"n": 2}, "n"),
        ({"logprobs": 3}, "logprobs"),
        ({"echo": True}, "echo"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(fields: dict[str, Any], param: str) -> None:
    error = refused(body(**fields))
    assert error.param == param
    assert param in str(error)
    assert error_body(error)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"5", b'"a"', b"{}", b'{"model": "m"}'])
def test_what_is_no_request_is_refused(data: bytes) -> None:
    refused(data)


def test_a_field_nobody_knows_is_named() -> None:
    assert "max_token" in str(refused(body(max_token=5)))


@given(st.binary(max_size=60))
def test_no_body_breaks_the_parser(data: bytes) -> None:
    with suppress(RequestError):
        parse_body(data)


def test_neutral_values_of_what_is_not_supported_are_fine() -> None:
    parsed = parse_body(body(n=1, echo=False, logprobs=None, presence_penalty=0, logit_bias={}, user="u"))
    assert parsed.max_tokens == 16


def made(**fields: Any) -> Any:
    parsed = parse_body(body(**fields))
    return make_request(parsed, None, vocab_size=300, end_ids=frozenset([2]), max_len=20)


def test_a_request_carries_what_was_asked() -> None:
    request = made(max_tokens=5, temperature=0.5, top_k=3, top_p=0.9, seed=7)
    assert list(request.prompt) == [1, 2, 3]
    assert request.max_tokens == 5
    assert request.sampling == type(request.sampling)(0.5, 3, 0.9, 7)
    assert request.end_ids == {2}
    assert made(ignore_eos=True).end_ids == frozenset()
    assert made(temperature=1e-9).sampling.temperature == 0
    assert made().sampling.seed != made().sampling.seed


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [300]}, "300"),
        ({"prompt": [1] * 20, "max_tokens": 1}, "20 tokens"),
        ({"prompt": [1] * 10, "max_tokens": 11}, "at most 20"),
        ({"prompt": "text"}, "no tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        made(**fields)
    assert caught.value.status == 400


def test_the_whole_context_may_be_used() -> None:
    assert made(prompt=[1] * 10, max_tokens=10).most_positions == 19


def test_headers() -> None:
    assert opts_in("capture=rows", None) and opts_in(None, "capture=rows")
    assert opts_in("a=b, capture=rows", None)
    assert not opts_in("capture=row", "capture=row") and not opts_in(None, None)


def test_an_answer_has_openai_shape() -> None:
    request = made(max_tokens=2)
    request.output = [4, 5]
    whole = Answer(request, "m", with_ids=True).whole("ab", [4, 5], "length")
    assert whole["object"] == "text_completion"
    assert whole["id"] == request.name
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert whole["choices"][0] | {} == {
        "index": 0,
        "text": "ab",
        "logprobs": None,
        "finish_reason": "length",
        "token_ids": [4, 5],
        "prompt_token_ids": [1, 2, 3],
    }
    bare = Answer(request, "m", with_ids=False).whole("ab", [4, 5], "length")["choices"][0]
    assert "token_ids" not in bare
    assert isinstance(parse_body(body()), CompletionRequest)
