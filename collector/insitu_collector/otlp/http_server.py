"""The port of OTLP/HTTP: a loop on a thread of its own, where no slow client keeps others out."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from dataclasses import dataclass
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from insitu_collector.access.gate import Gate
from insitu_collector.otlp.http_app import TRANSPORT, build
from insitu_collector.otlp.receiver import Receiver

STOP_S: Final = 2


@dataclass(frozen=True, slots=True)
class Patience:
    """What is put up with from clients."""

    head_s: float = 10.0
    """How long the head of a request may take, from when its connection is made or the last answer was given."""
    body_s: float = 10.0
    """How long its body may take."""
    max_connections: int = 512
    """At once. One more, and the one whose turn to send it has been for longest is ended."""


class HttpServer:
    """Serves OTLP/HTTP on a socket that listens, from when it is made until `stop`."""

    def __init__(
        self, receiver: Receiver, gate: Gate, listener: socket.socket, patience: Patience | None = None
    ) -> None:
        bounds = patience or Patience()
        self._socket = listener
        config = uvicorn.Config(
            build(receiver, gate, bounds.body_s),
            http=type("Protocol", (_Protocol,), {"patience": bounds}),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,  # a caller is who is connected, whatever a header says
            server_header=False,
            timeout_graceful_shutdown=STOP_S,
            timeout_keep_alive=math.ceil(bounds.head_s),  # exporters send each 5 s, which is when it closed by default
        )
        config.load()
        config.ssl = gate.tls_context()
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="insitu-otlp-http", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def stop(self) -> None:
        """Accept no more, answer what came, end. Safe to call twice."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


class _Protocol(H11Protocol):
    """A connection that ends when a head does not come in time, and gives way to others when there are too many."""

    patience = Patience()
    _since_s = 0.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, TRANSPORT: transport}
        self._expect_head()
        if len(self.connections) > self.patience.max_connections:
            waiting = [each for each in self.connections if isinstance(each, _Protocol) and each.is_waiting]
            min(waiting, key=lambda each: each._since_s).transport.abort()

    @property
    def is_waiting(self) -> bool:
        """Whether it is the peer's turn: a request, or the rest of one, is to come."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._drop_deadline()

    def on_response_complete(self) -> None:
        self._expect_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_deadline()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._drop_deadline()
        self._since_s = self.loop.time()
        self._deadline = self.loop.call_later(self.patience.head_s, self.transport.abort)

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
