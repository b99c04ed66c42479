"""OTLP/gRPC: the three services on the collector's own port. Their server leaves it to them to decompress messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import grpc

from insitu_collector.access.gate import Gate, Role
from insitu_collector.otlp.bodies import GZIP_MAGIC
from insitu_collector.otlp.problems import Problem
from insitu_collector.otlp.receiver import Encoded, Receiver
from insitu_collector.otlp.signals import SIGNALS, Signal

REMEDY: Final = "sending to this collector needs the role ship"


def handlers(receiver: Receiver, gate: Gate) -> tuple[grpc.GenericRpcHandler[Any, Any], ...]:
    """Return the services, for a server that leaves it to them to decompress messages."""
    return tuple(
        grpc.method_handlers_generic_handler(
            signal.service,
            {
                "Export": grpc.unary_unary_rpc_method_handler(
                    _export(signal, receiver, gate), response_serializer=signal.response.SerializeToString
                )
            },
        )
        for signal in SIGNALS
    )


def _export(signal: Signal, receiver: Receiver, gate: Gate) -> Callable[[bytes, Any], Any]:
    def export(request: bytes, context: Any) -> Any:
        caller = gate.require(context, Role.SHIP, REMEDY)
        try:
            with receiver.held(caller.tenant, len(request)):
                body = Encoded(request, is_gzip=request.startswith(GZIP_MAGIC))
                return receiver.receive(signal, body, caller.tenant)
        except Problem as problem:
            receiver.refused(signal, problem)
            context.set_trailing_metadata(_details(problem))
            context.abort(problem.code, problem.text)

    return export


def _details(problem: Problem) -> tuple[tuple[str, bytes], ...]:
    details: list[tuple[str, bytes]] = [("grpc-status-details-bin", problem.status().SerializeToString())]
    retry = problem.retry_info()
    if retry is not None:  # where Python's exporter looks for it
        details.append(("google.rpc.retryinfo-bin", retry.SerializeToString()))
    return tuple(details)
