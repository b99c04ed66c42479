"""Failures that a person or a client is told about, each in one line."""

from __future__ import annotations

import sys


class EngineError(Exception):
    """A failure of the engine; the message is one line that names the thing and, where there is one, the remedy."""


class PeerLost(EngineError):
    """A neighbouring rank closed the connection; that rank, not this one, is the cause."""


class RequestError(Exception):
    """A request that cannot be served. Becomes an OpenAI-shaped JSON error with `status`."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """What OpenAI's API calls the `type` of an error."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, with its type where the message alone says too little."""
    text = " ".join(str(error).split())
    if isinstance(error, EngineError | RequestError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def say(text: str) -> None:
    """Tell the person at the terminal; stdout is for the answer."""
    print(f"insitu serve: {text}", file=sys.stderr, flush=True)
