"""Where OTLP goes and how, from a URL and OpenTelemetry's own variables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.util.re import parse_env_headers

from insitu.exporters.otlp.ends import COMPRESSIONS, PORTS, SIGNALS, setting, target_of

HTTP: Final = "http/protobuf"
GRPC: Final = "grpc"
DEFAULT_TIMEOUT_S: Final = 10.0
_SCHEMES: Final = {"http": False, "https": True, "grpc": False, "grpcs": True}
"""Scheme -> whether it is encrypted."""


@dataclass(frozen=True, slots=True)
class Way:
    """How one signal is sent."""

    timeout_s: float = DEFAULT_TIMEOUT_S
    compression: str = "none"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """May be secret."""
    ca_file: str = ""
    client_cert: str = ""
    client_key: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """One receiver. `url` is as it was given: what a cursor is kept under, and without anything secret."""

    url: str
    protocol: str
    is_encrypted: bool
    place: str
    """HOST:PORT."""
    path: str
    """Of HTTP, before `/v1/SIGNAL`; "" or with a slash first."""
    ways: Mapping[str, Way]
    """By signal."""

    def address(self, signal: str) -> str:
        """Return the URL of a signal over HTTP."""
        return f"http{'s' if self.is_encrypted else ''}://{self.place}{self.path}/v1/{signal}"


def parse_target(url: str, environment: Mapping[str, str]) -> Target:
    """Return where a URL leads: http, https, grpc, grpcs or otlp.

    http and https are OTLP over HTTP, unless OTEL_EXPORTER_OTLP_PROTOCOL says `grpc`; otlp is what that variable says.
    Raises ValueError, one line, for what cannot be used.
    """
    parts = urlsplit(url)
    if parts.scheme not in (*_SCHEMES, "otlp") or not parts.hostname:
        raise ValueError(f"{_shown(url)} is no OTLP receiver; write http://HOST:4318, grpc://HOST:4317 or https, grpcs")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"{_shown(url)}: no user, password or query in it; put them into OTEL_EXPORTER_OTLP_HEADERS")
    _ = parts.port  # raises ValueError for what is no port
    asked = setting("PROTOCOL", "traces", environment)
    if parts.scheme == "otlp":
        protocol = target_of("traces", parts.netloc, environment).protocol
        is_encrypted = bool(setting("CERTIFICATE", "traces", environment))
        is_encrypted |= setting("INSECURE", "traces", environment).lower() == "false"
    else:
        is_grpc = parts.scheme.startswith("grpc") or asked == GRPC
        protocol, is_encrypted = GRPC if is_grpc else HTTP, _SCHEMES[parts.scheme]
    place = parts.netloc if parts.port is not None else f"{parts.netloc}:{PORTS[protocol]}"
    if parts.port is None and protocol == HTTP and parts.scheme in ("http", "https"):
        place = parts.netloc  # as any URL: 80 and 443
    path = parts.path.rstrip("/")
    if protocol == GRPC and path:
        raise ValueError(f"{_shown(url)}: OTLP over gRPC has no path")
    ways = {signal: way_of(signal, protocol, environment) for signal in SIGNALS}
    return Target(url, protocol, is_encrypted, place, path, ways)


def way_of(signal: str, protocol: str, environment: Mapping[str, str]) -> Way:
    """Return how a signal is sent, by OTEL_EXPORTER_OTLP_* variables. Raises ValueError for what cannot be."""
    compression = setting("COMPRESSION", signal, environment).lower() or "none"
    if compression not in COMPRESSIONS[protocol]:
        known = ", ".join(COMPRESSIONS[protocol])
        raise ValueError(f"OTEL_EXPORTER_OTLP_COMPRESSION is {compression!r}; {protocol} has {known}")
    told = setting("TIMEOUT", signal, environment)
    try:
        timeout_s = float(told or DEFAULT_TIMEOUT_S)
    except ValueError:
        timeout_s = 0.0
    if not timeout_s > 0:
        raise ValueError(f"OTEL_EXPORTER_OTLP_TIMEOUT is {told!r}; write seconds, like 10")
    return Way(
        timeout_s,
        compression,
        parse_env_headers(setting("HEADERS", signal, environment), liberal=True),
        setting("CERTIFICATE", signal, environment),
        setting("CLIENT_CERTIFICATE", signal, environment),
        setting("CLIENT_KEY", signal, environment),
    )


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.scheme else repr(url[:40])
