"""A channel to a collector: with TLS where the address says so, with the caller's token where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import grpc

from insitu.credentials import NONE, CredentialError, Credentials
from insitu.wire.address import Address

HEADER: Final = "authorization"
STORE_ID: Final = "insitu-store-id"
"""Initial metadata of `Ship`: which store the collector writes."""


def open_channel(
    address: Address, credentials: Credentials = NONE, options: Sequence[tuple[str, Any]] = ()
) -> grpc.Channel:
    """Return a channel whose every call shows what the credentials hold now. Raises CredentialError, one line."""
    token = credentials.token()
    if not address.is_secure:
        if token is not None and not address.is_loopback:
            raise CredentialError(f"a token does not go over the network in the clear; write grpcs://{address.target}")
        channel = grpc.insecure_channel(address.target, options=list(options))
    else:
        key, chain = credentials.pair() or (None, None)
        shown = grpc.ssl_channel_credentials(credentials.ca(), key, chain)
        channel = grpc.secure_channel(address.target, shown, options=list(options))
    return channel if token is None else grpc.intercept_channel(channel, _Bearer(token))


class _Details(NamedTuple):
    """Of a call, as interceptors hand it on."""

    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Shows a token at each call."""

    def __init__(self, token: str) -> None:
        self._header = (HEADER, f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        return continuation(self._with_header(details), request)

    def intercept_unary_stream(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        return continuation(self._with_header(details), request)

    def intercept_stream_stream(
        self, continuation: Callable[[Any, Any], Any], details: Any, requests: Iterator[Any]
    ) -> Any:
        return continuation(self._with_header(details), requests)

    def _with_header(self, details: Any) -> _Details:
        metadata = [*(details.metadata or ()), self._header]
        return _Details(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
