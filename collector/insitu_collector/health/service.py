"""Health over gRPC: `grpc.health.v1`, and what the collector answers `insitu doctor`."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Final

import grpc
from grpc_health.v1.health import OVERALL_HEALTH, HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from insitu.identity import package_version
from insitu.wire.insitu_pb2 import DESCRIPTOR, HealthAnswer
from insitu_collector.health.health import Report
from insitu_collector.health.readiness import State

COLLECTOR: Final[str] = DESCRIPTOR.services_by_name["Collector"].full_name
MAX_WATCHERS: Final = 32
"""Each takes a call's place for as long as it watches."""


class StatusService(HealthServicer):
    """SERVING is "can store durably", of the whole server and of the service `insitu.v1.Collector` alike."""

    def __init__(self, server: grpc.Server) -> None:
        super().__init__()
        self._watchers = threading.BoundedSemaphore(MAX_WATCHERS)
        self.show(is_ready=False)
        add_HealthServicer_to_server(self, server)

    def show(self, *, is_ready: bool) -> None:
        """Tell whoever asks, and whoever watches."""
        status = HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING
        for service in (OVERALL_HEALTH, COLLECTOR):
            self.set(service, status)

    def Watch(self, request: Any, context: Any, send_response_callback: Any = None) -> Any:
        """Tell each change of status; so many at once, since the next caller needs a place too."""
        if not self._watchers.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already; ask with Check")
        if not context.add_callback(self._watchers.release):
            self._watchers.release()
        return super().Watch(request, context, send_response_callback)

    def on_change(self, state: State) -> None:
        """Take a new state."""
        self.show(is_ready=state.is_ready)


def answer_of(report: Report) -> HealthAnswer:
    """Return a report as the wire has it; without tenants, since whoever asks may not know of others."""
    refused: Counter[str] = Counter()
    for (reason, _), taken in report.totals.refused.items():
        refused[reason] += taken.frames
    return HealthAnswer(
        ready=report.state.is_ready,
        reason=str(report.state.trouble or ""),
        text=report.state.why_not,
        version=package_version(),
        up_s=report.up_s,
        free_bytes=report.free_bytes,
        num_streams=report.load.num_streams,
        in_flight_bytes=report.load.in_flight_bytes,
        refused_frames=refused,
        ended_streams=report.totals.hung_up,
        dropped_rows=report.totals.dropped,
        gap_rows=report.totals.gaps,
        num_sync_failures=report.totals.num_sync_failures,
    )
