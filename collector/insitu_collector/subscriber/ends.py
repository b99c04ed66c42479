"""The two ways to a receiver: bytes of a request out, what it answers in. Each attempt ends within its timeout."""

from __future__ import annotations

import gzip
import ssl
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
import requests

from insitu.identity import package_version
from insitu.pem import load_authorities, load_pair
from insitu_collector.subscriber.answers import Answer, Outcome, of_grpc, of_http, taken
from insitu_collector.subscriber.payloads import Payload
from insitu_collector.subscriber.target import GRPC, Target, Way
from insitu_collector.subscriber.unreached import OF_PROXY, of_error

MAX_REPLY_BYTES: Final = 64 << 10
"""Of what a receiver says; the rest is not read."""
_METHODS: Final[Mapping[str, str]] = {
    signal: f"/opentelemetry.proto.collector.{package}.v1.{service}/Export"
    for signal, package, service in (
        ("traces", "trace", "TraceService"),
        ("metrics", "metrics", "MetricsService"),
        ("logs", "logs", "LogsService"),
    )
}
_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 5_000),  # how long to wait is decided here, not by the channel
)
_ENCODERS: Final[Mapping[str, Callable[[bytes], bytes]]] = {"gzip": gzip.compress, "deflate": zlib.compress}


class End(Protocol):
    """Sends requests to one receiver. Used by one thread."""

    def send(self, payload: Payload) -> Answer:
        """Return what became of one attempt. Raises nothing that the receiver or the network does."""
        ...

    def close(self) -> None:
        """Hang up. Safe to call twice."""
        ...


def open_end(target: Target) -> End:
    """Return the way to a receiver; nothing is connected yet. Raises ValueError for certificates that are none.

    Whether they have expired is left to the receiver: a collector does not stay away because another's door is shut.
    """
    for way in target.ways.values():
        _check_files(way)
    return GrpcEnd(target) if target.protocol == GRPC else HttpEnd(target)


def _check_files(way: Way) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if way.ca_file:
        load_authorities(context, way.ca_file)
    if way.client_cert or way.client_key:
        if not way.client_cert:
            raise ValueError("OTEL_EXPORTER_OTLP_CLIENT_KEY is set; set OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE, too")
        load_pair(context, way.client_cert, way.client_key or way.client_cert)


class HttpEnd:
    """OTLP over HTTP, binary. Redirects are not followed: they would carry the data to somebody who was not named."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._session = requests.Session()

    def send(self, payload: Payload) -> Answer:
        way = self._target.ways[payload.signal]
        deadline = time.monotonic() + way.timeout_s
        try:
            with self._post(payload, way) as response:
                body = _read(response, deadline)
        except requests.exceptions.SSLError as error:
            return Answer(Outcome.HELD, "TLS", of_error(error))
        except requests.exceptions.ProxyError:
            return Answer(Outcome.AGAIN, "unreachable", OF_PROXY)
        except requests.exceptions.Timeout:
            return Answer(Outcome.AGAIN, "timeout", f"no answer within {way.timeout_s:g} s")
        except (requests.exceptions.RequestException, OSError) as error:
            return Answer(Outcome.AGAIN, "unreachable", of_error(error))
        return of_http(payload.signal, response.status_code, response.headers, body, time.time())

    def _post(self, payload: Payload, way: Way) -> requests.Response:
        headers = {"Content-Type": "application/x-protobuf", "User-Agent": f"insitu/{package_version()}", **way.headers}
        body = payload.body
        if way.compression in _ENCODERS:
            body, headers["Content-Encoding"] = _ENCODERS[way.compression](body), way.compression
        return self._session.post(
            self._target.address(payload.signal),
            data=body,
            headers=headers,
            timeout=way.timeout_s,
            verify=way.ca_file or True,
            cert=(way.client_cert, way.client_key) if way.client_cert and way.client_key else way.client_cert or None,
            allow_redirects=False,
            stream=True,
        )

    def close(self) -> None:
        self._session.close()


def _read(response: requests.Response, deadline: float) -> bytes:
    """Return the body as far as it is of use. Raises requests' Timeout where it drips beyond the deadline."""
    found = b""
    for part in response.iter_content(4096):
        found += part
        if len(found) > MAX_REPLY_BYTES:
            break
        if time.monotonic() > deadline:
            raise requests.exceptions.ReadTimeout
    return found[:MAX_REPLY_BYTES]


class GrpcEnd:
    """OTLP over gRPC. The bytes of a request go as they are."""

    def __init__(self, target: Target) -> None:
        self._ways = target.ways
        way = target.ways["traces"]  # one connection, so the certificates of one signal
        if target.is_encrypted:
            self._channel = grpc.secure_channel(target.place, _credentials(way), _OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target.place, _OPTIONS)
        self._calls = {signal: self._channel.unary_unary(method, None, None) for signal, method in _METHODS.items()}

    def send(self, payload: Payload) -> Answer:
        way = self._ways[payload.signal]
        try:
            reply: bytes = self._calls[payload.signal](
                payload.body,
                timeout=way.timeout_s,
                metadata=tuple((name.lower(), value) for name, value in way.headers.items()),
                compression=grpc.Compression.Gzip if way.compression == "gzip" else grpc.Compression.NoCompression,
            )
        except grpc.RpcError as error:
            call: Any = error
            trailing = dict(call.trailing_metadata() or ())
            return of_grpc(call.code().name, call.details() or "", trailing.get("grpc-status-details-bin", b""))
        return taken(payload.signal, reply)

    def close(self) -> None:
        self._channel.close()


def _credentials(way: Way) -> grpc.ChannelCredentials:
    def content(file: str) -> bytes | None:
        return Path(file).read_bytes() if file else None

    key = way.client_key or way.client_cert  # one file may have both
    return grpc.ssl_channel_credentials(content(way.ca_file), content(key), content(way.client_cert))
