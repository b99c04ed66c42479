"""`/metrics`, `/healthz` and `/readyz` over HTTP, on the loopback address."""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import click

from insitu_collector.health.health import Health
from insitu_collector.health.metrics import HealthMetrics

HOST: Final = "127.0.0.1"
SLOW_S: Final = 5.0
"""How long a client may take for its request."""


class HealthPages:
    """Serves pages until it is closed; a Prometheus of another host reads them through a proxy of yours."""

    def __init__(self, port: int, health: Health) -> None:
        """port: 0 picks a free one. Raises ClickException, one line, when it cannot be had or the extra is missing."""
        try:
            from prometheus_client import CollectorRegistry
        except ModuleNotFoundError:
            raise click.ClickException(
                "--metrics-port needs the package prometheus-client: pip install 'insitu[collector]'"
            ) from None
        registry = CollectorRegistry()
        registry.register(HealthMetrics(health.report))
        try:
            self._server = _Server((HOST, port), _Handler)
        except OSError as error:
            raise click.ClickException(
                f"cannot serve metrics on {HOST}:{port}: {error.strerror}; choose another --metrics-port (0: any)"
            ) from None
        self._server.health, self._server.registry = health, registry
        self._thread = threading.Thread(target=self._server.serve_forever, name="insitu-pages", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    health: Health
    registry: Any


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = SLOW_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._metrics()
        elif path == "/healthz":  # it answers: that is all there is to say
            self._answer(HTTPStatus.OK, "text/plain; charset=utf-8", b"ok\n")
        elif path == "/readyz":
            state = self.server.health.readiness.state
            body = {"schema": "insitu.ready/1", "ready": state.is_ready, "reason": state.trouble, "text": state.why_not}
            status = HTTPStatus.OK if state.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, "application/json", json.dumps(body).encode() + b"\n")
        else:
            self._answer(
                HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"/metrics, /healthz and /readyz are here\n"
            )

    def _metrics(self) -> None:
        from prometheus_client.exposition import choose_encoder

        encode, kind = choose_encoder(self.headers.get("Accept") or "")
        self._answer(HTTPStatus.OK, kind, encode(self.server.registry))

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: a scrape every few seconds is no news."""
