"""OTLP/HTTP: what is asked at /v1/traces, /v1/metrics and /v1/logs, and how it is answered."""

from __future__ import annotations

import asyncio
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.json_format import MessageToJson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from insitu_collector.access.gate import Gate, Role
from insitu_collector.otlp.grpc_services import REMEDY
from insitu_collector.otlp.limits import MAX_REQUEST_BYTES
from insitu_collector.otlp.problems import Problem, too_large
from insitu_collector.otlp.receiver import DURABLE_S, Encoded, Receiver
from insitu_collector.otlp.signals import SIGNALS, Signal

TRANSPORT: Final = "transport"
"""The connection of a request, in its state."""
PROTOBUF: Final = "application/x-protobuf"
JSON: Final = "application/json"


def build(receiver: Receiver, gate: Gate, body_s: float) -> Starlette:
    """Return the application. body_s: how long a body may take to come."""
    endpoints = [_Endpoint(signal, receiver, gate, body_s) for signal in SIGNALS]
    return Starlette(routes=[Route(each.signal.path, each.receive, methods=["POST"]) for each in endpoints])


class HttpCall:
    """A request as the gate sees calls of gRPC."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def peer(self) -> str:
        """Return who calls, as gRPC writes it."""
        host, port = self._request.client or ("", 0)
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return its headers, names in lower case."""
        return tuple(self._request.headers.items())

    def auth_context(self) -> dict[str, list[bytes]]:
        """Return what TLS knows of the caller: nothing without it."""
        shown = getattr(self._request.state, TRANSPORT).get_extra_info("ssl_object")
        if shown is None:
            return {}
        names = (shown.getpeercert() or {}).get("subjectAltName", ())
        return {
            "transport_security_type": [b"ssl"],
            "peer_uri": [name.encode() for kind, name in names if kind == "URI"],
            "peer_dns": [name.encode() for kind, name in names if kind == "DNS"],
        }

    def abort(self, code: grpc.StatusCode, text: str) -> NoReturn:
        """End the call."""
        raise Problem(code, text)


class _Endpoint:
    """One path."""

    def __init__(self, signal: Signal, receiver: Receiver, gate: Gate, body_s: float) -> None:
        self.signal = signal
        self._receiver = receiver
        self._gate = gate
        self._body_s = body_s

    async def receive(self, request: Request) -> Response:
        """Answer one request."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            return _reply(await self._store(request, media), media)
        except Problem as problem:
            self._receiver.refused(self.signal, problem)
            headers = {"Connection": "close"}  # what of the body has not come is not waited for
            if problem.retry_after is not None:
                headers["Retry-After"] = problem.retry_after
            return _reply(problem.status(), media, problem.http_status, headers)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    async def _store(self, request: Request, media: str) -> Any:
        caller = self._gate.require(HttpCall(request), Role.SHIP, REMEDY)
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        _check_form(media, encoding)
        body = _Body(self._receiver, caller.tenant)
        try:
            await body.read(request, self._body_s)
            encoded = Encoded(body.data(), is_gzip=encoding == "gzip", is_json=media == JSON)
            appended = await asyncio.wrap_future(self._receiver.append(self.signal, encoded, caller.tenant))
        finally:
            body.let_go()
        try:
            is_durable = await asyncio.wait_for(asyncio.wrap_future(appended.durable), DURABLE_S)
        except TimeoutError:
            is_durable = False
        return self._receiver.answer(appended, is_durable=is_durable)


class _Body:
    """What has come of a body, and the room it takes."""

    def __init__(self, receiver: Receiver, tenant: str) -> None:
        self._receiver = receiver
        self._tenant = tenant
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._held = 0

    async def read(self, request: Request, within_s: float) -> None:
        """Read all of it. Raises Problem when it is too large or too slow, or there is no room."""
        if int(request.headers.get("content-length", "0")) > MAX_REQUEST_BYTES:
            raise too_large(f"a body of over {MAX_REQUEST_BYTES} bytes; that is the most")
        try:
            async with asyncio.timeout(within_s):
                async for chunk in request.stream():
                    self._num_bytes += len(chunk)
                    if self._num_bytes > MAX_REQUEST_BYTES:
                        raise too_large(f"a body of over {MAX_REQUEST_BYTES} bytes; that is the most")
                    self.grow(len(chunk))
                    self._chunks.append(chunk)
        except TimeoutError:
            text = f"the body had not come after {within_s:g} s"
            raise Problem(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None

    def data(self) -> bytes:
        """Return it."""
        return b"".join(self._chunks)

    def grow(self, num_bytes: int) -> None:
        """Take more room. Raises Problem where there is none."""
        self._receiver.take(self._tenant, num_bytes)
        self._held += num_bytes

    def let_go(self) -> None:
        """Give its room back."""
        self._chunks.clear()
        self._receiver.give(self._tenant, self._held)
        self._held = 0


def _check_form(media: str, encoding: str) -> None:
    if media not in (PROTOBUF, JSON):
        text = f"the content type is {PROTOBUF} or {JSON}, not {media[:80] or 'unsaid'}"
        raise Problem(grpc.StatusCode.UNIMPLEMENTED, text)
    if encoding not in ("identity", "gzip", ""):
        raise Problem(grpc.StatusCode.UNIMPLEMENTED, f"the content encoding is gzip or none, not {encoding[:80]}")


def _reply(message: Any, media: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    if media == JSON:
        return Response(MessageToJson(message, indent=None), status, headers, media_type=JSON)
    return Response(message.SerializeToString(), status, headers, media_type=PROTOBUF)
