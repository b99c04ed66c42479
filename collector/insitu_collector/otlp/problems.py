"""Why a request is not taken, as both OTLP/gRPC and OTLP/HTTP say it."""

from __future__ import annotations

import math
from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

AGAIN_S: Final = 1.0
"""How long a client is asked to wait before it sends a request again."""

_HTTP: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.DEADLINE_EXCEEDED: 408,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 413,
    grpc.StatusCode.UNIMPLEMENTED: 415,
    grpc.StatusCode.UNAVAILABLE: 503,
}


class Problem(Exception):
    """A request is not taken. With `retry_s` it may be sent again, so many seconds later; without, never."""

    def __init__(self, code: grpc.StatusCode, text: str, retry_s: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.retry_s = retry_s

    @property
    def http_status(self) -> int:
        """The status of HTTP that means the same."""
        if self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_s is not None:
            return 429
        return _HTTP.get(self.code, 500)

    @property
    def retry_after(self) -> str | None:
        """The value of the header `Retry-After`: whole seconds."""
        return None if self.retry_s is None else str(math.ceil(self.retry_s))

    def retry_info(self) -> RetryInfo | None:
        """Return when to send again, in the form of google.rpc."""
        if self.retry_s is None:
            return None
        whole = int(self.retry_s)
        return RetryInfo(retry_delay=Duration(seconds=whole, nanos=int((self.retry_s - whole) * 1e9)))

    def status(self) -> Status:
        """Return it as google.rpc.Status."""
        status = Status(code=self.code.value[0], message=self.text)
        retry = self.retry_info()
        if retry is not None:
            status.details.add().Pack(retry)
        return status


def malformed(text: str) -> Problem:
    """Return why a request is nonsense, now and for ever."""
    return Problem(grpc.StatusCode.INVALID_ARGUMENT, text)


def too_large(text: str) -> Problem:
    """Return why a request is too large to be taken."""
    return Problem(grpc.StatusCode.RESOURCE_EXHAUSTED, text)


def throttled(text: str, wait_s: float) -> Problem:
    """Return why a request of somebody who has sent too much is not taken before `wait_s` have gone by."""
    return Problem(grpc.StatusCode.RESOURCE_EXHAUSTED, text, max(AGAIN_S, wait_s))


def not_now(text: str) -> Problem:
    """Return why a request cannot be taken now."""
    return Problem(grpc.StatusCode.UNAVAILABLE, text, AGAIN_S)
