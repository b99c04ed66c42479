"""Comparing this host's clock with a collector's, over the channel that ships records there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc

from insitu import forks
from insitu.exporters.clock_exchange import measure
from insitu.wire.insitu_pb2 import ClockQuery
from insitu.wire.insitu_pb2_grpc import CollectorStub

TIMEOUT_S: Final = 5.0
"""A clock that does not answer within this says nothing."""


def compare_clocks(
    channel: grpc.Channel,
    boot_id: str,
    clock: Callable[[], int],
    tell: Callable[[Sequence[dict[str, Any]]], None],
    rest: Callable[[], bool],
) -> None:
    """Measure this host's clock against the collector's again and again, while the connection lasts.

    Ends at once on the collector's own host, and where a collector of an older version knows no clocks. One that is
    slow to answer, and clocks that contradict themselves, are asked again later.

    boot_id, clock: of this host, the clock in ns. tell: takes rows of `clocks`. rest: waits until the next time; True
    when the connection is over.
    """
    stub = CollectorStub(channel)
    is_over = False
    while not is_over:
        try:
            with forks.turn:
                row = measure(
                    lambda: stub.Clock(ClockQuery(), timeout=TIMEOUT_S, wait_for_ready=True),
                    boot_id,
                    clock,
                )
            if row is None:
                return
            tell([row])
        except ValueError:  # hung up meanwhile
            return
        except grpc.RpcError as error:
            status: Any = error
            if status.code() is grpc.StatusCode.UNIMPLEMENTED:
                return
        is_over = rest()
