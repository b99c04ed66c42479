"""A server of gRPC that listens: how many calls it takes at once, what it bears of a connection, which port is its."""

from __future__ import annotations

import errno
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc

from insitu.intake import MAX_FRAME_BYTES, IntakeLimits

SPARE_CALLS: Final = 64
"""Calls at once beyond the streams: clocks, rules, health, and streams that are told that there is no place."""

_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # two collectors on one port must not share it silently
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES + (1 << 16)),
    ("grpc.keepalive_time_ms", 10_000),  # a peer that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # a minute otherwise, whatever the line above says
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.max_connection_idle_ms", 300_000),  # one without a call
    # gRPC makes all of a compressed message before it looks how large it is. Messages of OTLP come as they were sent
    # and are decompressed within bounds (otlp/grpc_services.py); probes send none that are compressed.
    ("grpc.per_message_decompression", 0),
    ("grpc.compression_enabled_algorithms_bitset", 0b101),  # none and gzip, as OTLP has it; not deflate
)


class PortInUse(OSError):
    """The port is taken, or the address is not this machine's."""


def check_port(host: str, port: int) -> None:
    """Raise PortInUse with the reason, which gRPC would only print."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortInUse(error.errno, (error.strerror or "not usable").lower(), f"{host}:{port}") from None


def make_server(limits: IntakeLimits) -> grpc.Server:
    """Return a server without services and ports."""
    # A stream holds one worker for its life, so there are more workers than streams: nobody else starves.
    num_calls = limits.streams + SPARE_CALLS
    pool = ThreadPoolExecutor(num_calls, thread_name_prefix="insitu-ship")
    options = (
        *_OPTIONS,
        ("grpc.server_handshake_timeout_ms", round(1000 * limits.handshake)),
        ("grpc.max_concurrent_streams", num_calls),  # of one connection: its peer's further calls wait there
    )
    return grpc.server(pool, options=options, maximum_concurrent_rpcs=num_calls)


def bind(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Let a server listen; return the port. Raises PortInUse."""
    try:
        if credentials is None:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            bound = server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError:
        bound = 0
    if not bound:
        raise PortInUse(errno.EADDRINUSE, "address already in use", f"{host}:{port}")
    return int(bound)
