"""Why a receiver was not reached: one reason and what to do, instead of a library's words. Pure."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator
from typing import Final

NOBODY: Final = "connection refused; start a receiver there, or name another"
NO_HOST: Final = "no such host; see that its name is right"
HUNG_UP: Final = "it hung up without an answer; see that it takes OTLP there, and whether it wants TLS"
EXPIRED: Final = "its certificate has expired; renew it there"
OTHER_NAME: Final = "its certificate is not for that name; use one that it was made for"
UNKNOWN: Final = "its certificate is of no authority that is known; name that one's with OTEL_EXPORTER_OTLP_CERTIFICATE"
NO_TLS: Final = "it speaks no TLS; write http:// or grpc://, or give it a certificate"
BROKE_OFF: Final = (
    "it broke the TLS handshake off; where it asks for certificates, name one that it takes with "
    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY"
)
OF_TLS: Final = frozenset((EXPIRED, OTHER_NAME, UNKNOWN, NO_TLS, BROKE_OFF))
"""Somebody has to do something first."""
OF_PROXY: Final = "the proxy that the environment names cannot be used; see HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
_GRPC_FAILED: Final = "failed to connect to all addresses"
_GRPC_SAYS: Final = (
    ("certificate has expired", EXPIRED),
    ("Hostname Verification", OTHER_NAME),
    ("CERTIFICATE_VERIFY_FAILED", UNKNOWN),
    ("WRONG_VERSION_NUMBER", NO_TLS),
    ("Tls handshake", BROKE_OFF),
    ("Connection refused", NOBODY),
    ("Socket closed", HUNG_UP),
    ("onnection reset", HUNG_UP),
)
"""The first that a status of gRPC has in it."""
_GRPC_NO_HOST: Final = ("errors resolving", "DNS resolution failed", "Domain name not found")


def of_error(error: BaseException) -> str:
    """Return why an attempt over HTTP failed: what lies at the bottom of what `requests` raised."""
    for cause in reversed(list(_causes(error))):
        if isinstance(cause, ssl.SSLError):
            return _of_tls(cause)
        if isinstance(cause, socket.gaierror):
            return NO_HOST
        if isinstance(cause, ConnectionRefusedError):
            return NOBODY
        if isinstance(cause, ConnectionError | http.client.HTTPException):
            return HUNG_UP
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror.lower()}; see that it can be reached from here"
    return " ".join(str(error).split()) or type(error).__name__


def of_details(details: str) -> str:
    """Return why a call of gRPC reached nobody; what a receiver said itself is returned as it is."""
    if any(words in details for words in _GRPC_NO_HOST):
        return NO_HOST
    if _GRPC_FAILED not in details:
        return details
    return next((why for words, why in _GRPC_SAYS if words in details), details)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        held = (each for each in error.args if isinstance(each, BaseException))  # urllib3 keeps some so
        error = error.__cause__ or error.__context__ or next(held, None)


def _of_tls(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if "expired" in error.verify_message:
            return EXPIRED
        return OTHER_NAME if "match" in error.verify_message else UNKNOWN
    return NO_TLS if error.reason == "WRONG_VERSION_NUMBER" else BROKE_OFF
