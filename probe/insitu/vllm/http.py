"""The headers of a request to vLLM's server, handed on with its sampling parameters."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final

from insitu.session.opt_in import CAPTURE, NAME
from insitu.vllm.asked import TRACE
from insitu.vllm.hooks import guard, wrap

_HANDED_ON: Final = (b"traceparent", b"tracestate", b"baggage")
_told: ContextVar[dict[str, Any] | None] = ContextVar("insitu_vllm_headers", default=None)
"""What the headers of the request that is served now say, as `extra_args` has it."""


class Headers:
    """ASGI middleware: remembers what a request's headers say, for whatever it starts."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            _told.set(extra_of(scope["headers"]))
        await self._app(scope, receive, send)


def extra_of(headers: Any) -> dict[str, Any] | None:
    """Return what goes into `extra_args`, None for nothing. headers: pairs of bytes, as ASGI has them."""
    found: dict[str, Any] = {}
    trace: dict[str, str] = {}
    for name, value in headers:
        text = value.decode("latin-1")
        if name == NAME.encode() and CAPTURE in text:
            found[NAME] = f"{found[NAME]},{text}" if NAME in found else text
        elif name in _HANDED_ON and name.decode() not in trace:
            trace[name.decode()] = text
    if trace:
        found[TRACE] = trace
    return found or None


def read_headers() -> None:
    """Put the middleware into servers that this process builds. Raises NotThere."""
    app = sys.modules.get("vllm.entrypoints.launchers.app")
    if app is None:  # this process is no server
        return
    from vllm.v1.engine.async_llm import AsyncLLM

    def around_middleware(init: Callable[..., Any]) -> Callable[..., Any]:
        def init_entrypoints_middleware(args: Any, app: Any, *others: Any, **kwargs: Any) -> Any:
            done = init(args, app, *others, **kwargs)
            try:
                app.add_middleware(Headers)
            except Exception as error:
                guard.contain(error)
            return done

        return init_entrypoints_middleware

    def around_add(add: Callable[..., Any]) -> Callable[..., Any]:
        async def add_request(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                _hand_on(params, prompt)
            except Exception as error:
                guard.contain(error)
            return await add(self, request_id, prompt, params, *args, **kwargs)

        return add_request

    wrap(app, "init_entrypoints_middleware", ("args", "app"), around_middleware)
    wrap(AsyncLLM, "add_request", ("request_id", "prompt", "params"), around_add)


def _hand_on(*holders: Any) -> None:
    told = _told.get()
    for holder in holders if told else ():
        params = getattr(holder, "sampling_params", holder)
        if hasattr(params, "extra_args"):
            params.extra_args = {**told, **(params.extra_args or {})}  # type: ignore[dict-item]
