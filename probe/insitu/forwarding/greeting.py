"""Asking a collector whether it is there, and which store it writes, before anything is said of what it has."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import grpc

from insitu.credentials import CredentialError, Credentials
from insitu.exporters.collector import PROTOCOL
from insitu.forwarding.lane import Unreachable
from insitu.identity import Source
from insitu.wire.address import Address
from insitu.wire.channel import STORE_ID, open_channel
from insitu.wire.insitu_pb2 import Hello, ToCollector
from insitu.wire.insitu_pb2_grpc import CollectorStub
from insitu.wire.refusals import why_refused

AGAIN_S: Final = 0.2
_NOBODY: Final = ("Connection refused", "DNS resolution failed")
"""How gRPC says that nothing listens there, or that there is no such host: waiting changes neither."""
_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


def store_id_at(
    to: str, source: Source, timeout_s: float, clock: Callable[[], float], credentials: Credentials
) -> str | None:
    """Say Hello to a collector; return the identity of its store, None where it tells none (an older collector).

    timeout_s: how long one that starts, or has no place, is asked again. Raises Unreachable, with one line that says
    why, where nobody answers or this caller may not ship.
    """
    address = Address.of(to)
    deadline = clock() + timeout_s
    while True:
        left_s = max(0.0, deadline - clock())
        try:
            return _ask(address, source, None if left_s == float("inf") else left_s, credentials)
        except CredentialError as error:
            raise Unreachable(str(error)) from None
        except grpc.RpcError as error:
            why, is_final = _why(address, error)
            if is_final or clock() >= deadline:
                raise Unreachable(why) from None
        threading.Event().wait(AGAIN_S)


def _ask(address: Address, source: Source, timeout_s: float | None, credentials: Credentials) -> str | None:
    hello = Hello(protocol=PROTOCOL, epoch=source.epoch, source=source.labels())
    with open_channel(address, credentials, _OPTIONS) as channel:
        call: Any = CollectorStub(channel).Ship(iter([ToCollector(hello=hello)]), timeout=timeout_s)
        for _ in call:  # to its end: only then is it known that Hello was taken
            pass
        return next((str(value) for key, value in call.initial_metadata() or () if key == STORE_ID), None)


def _why(address: Address, error: Any) -> tuple[str, bool]:
    """Return why a call failed, and whether that stays so. error: what a call raised, which is itself the call."""
    code, details = error.code(), error.details() or ""
    refused = why_refused(address, code, details)
    if refused is not None:
        return refused, True
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"{address} is no collector of insitu; it may be one of OpenTelemetry", True
    if (
        code is grpc.StatusCode.DEADLINE_EXCEEDED
        or "failed to connect" in details
        or any(words in details for words in _NOBODY)
    ):
        port = address.target.rpartition(":")[2]
        why = f"no collector answers at {address}; start one: insitu collect --store DIR --port {port}"
        return why, any(words in details for words in _NOBODY)
    return f"collector {address} takes nothing ({code.name.lower()}: {details})", False
