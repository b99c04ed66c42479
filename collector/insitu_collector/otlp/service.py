"""OTLP as a part of the collector: begun with it, ended with it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from insitu_collector.access.gate import Gate
from insitu_collector.admission.admission import Admission
from insitu_collector.health.counts import Counts
from insitu_collector.otlp.grpc_services import handlers
from insitu_collector.otlp.receiver import Receiver
from insitu_collector.service.ingest import Ingest

if TYPE_CHECKING:
    from insitu_collector.otlp.http_server import Patience


class Otlp:
    """Receives OTLP/gRPC on the collector's server and, from `listen` on, OTLP/HTTP on a port of its own."""

    def __init__(
        self,
        gate: Gate,
        admission: Admission,
        counts: Counts,
        on_append: Callable[[], None],
        tell: Callable[[str, str], None],
    ) -> None:
        """tell: stores an event (kind, text); raises OSError when it cannot."""
        self._gate = gate
        self._receiver = Receiver(admission, counts, on_append, lambda text: tell("otlp_rejected", text))
        self._http: Any = None

    def add_to(self, server: grpc.Server) -> None:
        """Add the services of OTLP/gRPC to a server."""
        server.add_generic_rpc_handlers(handlers(self._receiver, self._gate))

    def begin(self, ingest: Ingest, listener: socket.socket | None) -> None:
        """Take what comes from now on: until then it is told to come again. listener: as of `listen`."""
        self._receiver.begin(ingest)
        if listener is not None:
            self.listen(listener)

    def listen(self, listener: socket.socket, patience: Patience | None = None) -> None:
        """Serve OTLP/HTTP on a socket that listens."""
        from insitu_collector.otlp.http_server import HttpServer

        self._http = HttpServer(self._receiver, self._gate, listener, patience)

    def to_json(self) -> dict[str, Any]:
        """Return what came, by what became of it."""
        return self._receiver.counts.to_json()

    def stop_taking(self) -> None:
        """Take no more; return once what was taken is appended."""
        self._receiver.stop()

    def stop(self) -> None:
        """End once what was taken is answered: after the last commit."""
        if self._http is not None:
            self._http.stop()
