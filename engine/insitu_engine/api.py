"""The HTTP surface: OpenAI-shaped completions, models, health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import insitu
from insitu.session.opt_in import NAME, unknown_word
from insitu_engine.completions import (
    Answer,
    CompletionRequest,
    error_body,
    make_request,
    most_bytes,
    opts_in,
    parse_body,
)
from insitu_engine.driver import Driver, End, Ticket
from insitu_engine.errors import RequestError, say
from insitu_engine.text import Detokenizer, StopFinder, Tokenizer


@dataclass(slots=True)
class Service:
    """What the routes need to know of the engine behind them."""

    driver: Driver
    model: str
    vocab_size: int
    end_ids: frozenset[int]
    max_len: int
    created: int
    tokenizer: Tokenizer | None = None
    is_word_told: bool = False
    """Whether it was said that a header asked for what there is not."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of an output as a client sees it. The last piece has `finish`."""

    text: str
    ids: list[int]
    finish: str | None


async def pieces(driver: Driver, ticket: Ticket, tokenizer: Tokenizer | None, stops: list[str]) -> AsyncIterator[Piece]:
    """Yield an output as it comes. Raises RequestError where the engine ended it; cancels it when closed early."""
    detokenizer, finder = Detokenizer(tokenizer), StopFinder(stops)
    try:
        while True:
            update = await ticket.updates.get()
            if isinstance(update, End):
                if update.error is not None:
                    raise update.error
                rest = finder.push(detokenizer.finish()) + finder.finish()
                yield Piece(rest, [], update.reason)
                return
            text = finder.push(detokenizer.push(update))
            if finder.found:
                driver.finish(ticket.request.name)
                yield Piece(text, [update], "stop")
                return
            yield Piece(text, [update], None)
    finally:
        driver.cancel(ticket.request.name)


def build(service: Service) -> Starlette:
    """Return the ASGI application."""
    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", one_model),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/health", ready),
        ],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_error,
            Exception: _on_bug,
        },
    )
    app.state.service = service
    return app


async def completions(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    body = parse_body(await _body(http, most_bytes(service.max_len)))
    if body.model != service.model:
        raise _unknown_model(body.model, service)
    if service.driver.status != "ready":
        raise service.driver.unavailable()
    request = make_request(
        body,
        service.tokenizer,
        vocab_size=service.vocab_size,
        end_ids=service.end_ids,
        max_len=service.max_len,
    )
    request.trace = insitu.request_context(http.headers)
    header = http.headers.get(NAME)
    request.capture = opts_in(header, request.trace.baggage.get(NAME))
    if not request.capture and not service.is_word_told and (wrong := unknown_word(header)) is not None:
        service.is_word_told = True
        say(f"the header {NAME}: {wrong}; rows of such requests are not taken")
    ticket = service.driver.submit(request)
    answer = Answer(request, service.model, body.return_token_ids)
    found = pieces(service.driver, ticket, service.tokenizer, body.stops)
    if body.stream:
        return StreamingResponse(_events(found, answer, body), media_type="text/event-stream")
    return await _whole(http, found, answer)


async def _body(http: HttpRequest, most: int) -> bytes:
    """Return the body. Raises RequestError (413) where it is larger than any prompt that fits.

    All of it is read, since a client that is still sending hears no answer; what is too much is not kept.
    """
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
    if size > most:
        raise RequestError(f"the body has {size} bytes; no prompt that fits has more than {most}", status=413)
    return b"".join(parts)


async def _whole(http: HttpRequest, found: AsyncIterator[Piece], answer: Answer) -> Response:
    """Collect the whole output, unless the client goes away first."""
    collecting = asyncio.ensure_future(_collect(found, answer))
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return JSONResponse(collecting.result())
        return Response(status_code=499)
    finally:
        for task in (collecting, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, RequestError):
                await task


async def _collect(found: AsyncIterator[Piece], answer: Answer) -> dict[str, Any]:
    text, ids, finish = [], [], "stop"
    async for piece in found:
        text.append(piece.text)
        ids += piece.ids
        finish = piece.finish or finish
    return answer.whole("".join(text), ids, finish)


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(found: AsyncIterator[Piece], answer: Answer, body: CompletionRequest) -> AsyncIterator[bytes]:
    """Yield server-sent events; an error after the first byte is an event too."""
    try:
        async for piece in found:
            if piece.text or piece.finish or (piece.ids and body.return_token_ids):
                yield _event(answer.body([answer.choice(piece.text, piece.ids, piece.finish)]))
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event({**answer.body([]), "usage": answer.usage()})
    except RequestError as error:
        yield _event(error_body(error))
    finally:
        await found.aclose()  # type: ignore[attr-defined]
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


async def models(http: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [_model(http.app.state.service)]})


async def one_model(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    if http.path_params["model"] != service.model:
        raise _unknown_model(http.path_params["model"], service)
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "insitu",
        "max_model_len": service.max_len,
    }


def _unknown_model(name: str, service: Service) -> RequestError:
    return RequestError(
        f"model {name!r} is not served here; this server has {service.model!r}",
        status=404,
        param="model",
        code="model_not_found",
    )


async def live(_: HttpRequest) -> Response:
    return JSONResponse({"status": "live"})


async def ready(http: HttpRequest) -> Response:
    driver = http.app.state.service.driver
    body = {"status": driver.status, **({"cause": driver.cause} if driver.cause else {})}
    return JSONResponse(body, 200 if driver.status == "ready" else 503)


async def _on_request_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else None
    return JSONResponse(error_body(error), error.status, headers)


async def _on_http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{http.method} {http.url.path}: {error.detail}"
    return JSONResponse(error_body(RequestError(text, status=error.status_code)), error.status_code, error.headers)


async def _on_bug(_: HttpRequest, error: Exception) -> Response:
    text = f"the server made a mistake: {type(error).__name__}: {error}"
    return JSONResponse(error_body(RequestError(text, status=500)), 500)
