"""The shapes of OpenAI's completions: what comes in, checked, and what goes out."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import msgspec

from insitu.session.opt_in import wants_rows
from insitu_engine.errors import RequestError
from insitu_engine.messages import Sampling
from insitu_engine.request import Request
from insitu_engine.text import Tokenizer

COLDEST: Final = 1e-5
"""Temperatures below it are greedy."""
REST_BYTES: Final = 65_536
"""What a body may have beside its prompt: stop words, a user's name, JSON itself."""
TOKEN_BYTES: Final = 64
"""And for each token. As an id it takes eight; as text four on average, and six for each letter that JSON escapes. More
would let one client keep the tokenizer, and with it all the others, busy for seconds."""
_WHERE: Final = re.compile(r"(.*) - at `\$\.(\w+).*`")

Positive = Annotated[int, msgspec.Meta(ge=1)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options` of a request."""

    include_usage: bool = False


class CompletionRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v1/completions`. Fields OpenAI has and this engine has not may only be neutral."""

    model: str
    prompt: str | list[Annotated[int, msgspec.Meta(ge=0)]]
    max_tokens: Positive = 16
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Extension: keep the k most likely tokens; 0 keeps all."""
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """Extension: end-of-text does not end the output."""
    return_token_ids: bool = False
    """Extension: `token_ids` of prompt and output stand in the answer."""
    user: str | None = None
    n: int | None = 1
    best_of: int | None = 1
    echo: bool | None = False
    logprobs: int | None = None
    suffix: str | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None,),
    "suffix": (None, ""),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "logit_bias": (None, {}),
}
_decoder = msgspec.json.Decoder(CompletionRequest)


def most_bytes(max_len: int) -> int:
    """Return how large a body may be where a request has at most `max_len` tokens."""
    return REST_BYTES + TOKEN_BYTES * max_len


def parse_body(body: bytes) -> CompletionRequest:
    """Return a checked request. Raises RequestError (400) that names the field and what it may be."""
    try:
        found = _decoder.decode(body)
    except msgspec.ValidationError as error:
        where = _WHERE.fullmatch(str(error))
        param = where[2] if where else None
        text = f"{param}: {where[1]}" if where else str(error)
        raise RequestError(text, param=param, code="invalid_value") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    for name, neutral in _NEUTRAL.items():
        if getattr(found, name) not in neutral:
            raise RequestError(f"{name} is not supported; leave it out", param=name, code="unsupported")
    return found


def make_request(
    body: CompletionRequest,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    end_ids: frozenset[int],
    max_len: int,
) -> Request:
    """Return the engine's request. Raises RequestError for a prompt that is empty, over-long or out of vocabulary."""
    prompt = body.prompt
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer; send the prompt as token ids", param="prompt")
        prompt = tokenizer.encode(prompt)
    if not prompt:
        raise RequestError("prompt is empty; it needs at least one token", param="prompt")
    if max(prompt) >= vocab_size:
        raise RequestError(
            f"prompt holds token id {max(prompt)}; the vocabulary ends at {vocab_size - 1}", param="prompt"
        )
    if len(prompt) + body.max_tokens > max_len:
        raise RequestError(
            f"prompt has {len(prompt)} tokens and max_tokens is {body.max_tokens}; "
            f"together they may be at most {max_len}",
            param="prompt" if len(prompt) >= max_len else "max_tokens",
            code="context_length_exceeded",
        )
    return Request(
        name=f"cmpl-{secrets.token_hex(12)}",
        prompt=prompt,
        max_tokens=body.max_tokens,
        sampling=Sampling(
            temperature=0.0 if body.temperature < COLDEST else body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            seed=secrets.randbits(62) if body.seed is None else body.seed % (1 << 62),
        ),
        end_ids=frozenset() if body.ignore_eos else end_ids,
    )


def opts_in(header: str | None, baggage: str | None) -> bool:
    """Return whether the header `insitu`, or that member of `baggage`, opts in to raw rows (`capture=rows`)."""
    return wants_rows(header) or wants_rows(baggage)


@dataclass(slots=True)
class Answer:
    """Builds the bodies of one completion's answer."""

    request: Request
    model: str
    with_ids: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, int]:
        prompt, output = len(self.request.prompt), len(self.request.output)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.request.name,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def choice(self, text: str, ids: list[int], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return {**choice, "token_ids": ids} if self.with_ids else choice

    def whole(self, text: str, ids: list[int], finish: str) -> dict[str, Any]:
        choice = self.choice(text, ids, finish)
        if self.with_ids:
            choice["prompt_token_ids"] = list(self.request.prompt)
        return {**self.body([choice]), "usage": self.usage()}


def error_body(error: RequestError) -> dict[str, Any]:
    """Return OpenAI's shape of an error."""
    return {"error": {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}}
