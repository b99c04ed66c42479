"""The collector as a gRPC server: connections, group commit, start and stop."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import grpc

from insitu.identity import boot_id
from insitu.segments.recovery import Recovery, recover_store
from insitu.segments.retention import Keep
from insitu.segments.shard import Key, ShardWriter
from insitu.wire.insitu_pb2 import (
    ClockQuery,
    ClockReading,
    RulesAnswer,
    RulesOrder,
    RulesQuery,
    ToCollector,
    ToProbe,
)
from insitu.wire.insitu_pb2_grpc import CollectorServicer, add_CollectorServicer_to_server
from insitu_collector.access.gate import Gate, Role
from insitu_collector.flight.relay import FlightRelay
from insitu_collector.service.connection import Connection, Rejected
from insitu_collector.service.ingest import MAX_FRAME_BYTES, SHARD, Ingest
from insitu_collector.service.rule_desk import RuleDesk, RulesRefused

COMMIT_S: Final = 0.05
COMMIT_BYTES: Final = 8 << 20
IDLE_TICK_S: Final = 1.0
"""How often files are sealed by age when nothing arrives."""
MAX_CONNECTIONS: Final = 256
STOP_S: Final = 3.0

_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # two collectors on one port must not share it silently
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES + (1 << 16)),
    ("grpc.keepalive_time_ms", 10_000),  # a peer that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)

_log = logging.getLogger("insitu")


class PortInUse(OSError):
    """The port is taken, or the address is not this machine's."""


def _check_port(host: str, port: int) -> None:
    """Raise PortInUse with the reason, which gRPC would only print."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortInUse(error.errno, (error.strerror or "not usable").lower(), f"{host}:{port}") from None


def _report(recovery: Recovery) -> None:
    if recovery.num_segments:
        _log.warning(
            "insitu: recovered %d segments (%d rows) of writers that died; %d stretches lost",
            recovery.num_segments,
            recovery.num_rows,
            len(recovery.damage),
        )


class CollectorServer(CollectorServicer):  # type: ignore[misc]  # the generated base has no types
    """Receives frames into one store. Started by the constructor, stopped by `stop` or at the end of `with`.

    Raises PortInUse; ShardLocked when another collector writes the store; StoreFull; OSError when the store cannot
    be written.
    """

    def __init__(
        self, store: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 4317, keep: Keep | None = None
    ) -> None:
        self.store = Path(store)
        self.gate = Gate()
        _check_port(host, port)  # before the store is touched
        writer = ShardWriter(self.store, SHARD)
        try:
            self.ingest = Ingest(writer, keep=keep)
            _report(writer.recovery)
            others = recover_store(self.store)
            self.ingest.lost(others.damage)
            _report(others)
            self._grpc = self._make_grpc()
            self.port = self._bind(host, port)
        except BaseException:
            writer.close()
            raise
        self.relay = FlightRelay(self.ingest.write_own)
        self.address = f"grpc://{host}:{self.port}"
        self._connections: set[Connection] = set()
        self._desk = RuleDesk(self._write_event)
        self._lock = threading.Lock()
        self._due = threading.Condition()
        self._boot_id = boot_id()
        self._has_uncommitted = False
        self._is_stopping = False
        self._committer = threading.Thread(target=self._commit_loop, name="insitu-commit", daemon=True)
        self._committer.start()
        self._grpc.start()

    def _make_grpc(self) -> grpc.Server:
        # A connection holds one worker for its life, so there are as many workers as connections: none starves.
        pool = ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="insitu-ship")
        server = grpc.server(pool, options=_OPTIONS, maximum_concurrent_rpcs=MAX_CONNECTIONS)
        add_CollectorServicer_to_server(self, server)
        return server

    def _bind(self, host: str, port: int) -> int:
        try:
            bound = self._grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise PortInUse(errno.EADDRINUSE, "address already in use", f"{host}:{port}")
        return int(bound)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def Ship(self, messages: Iterator[ToCollector], context: Any) -> Iterator[ToProbe]:
        """Serve one probe (see insitu.proto)."""
        connection = Connection(self.ingest, self._appended, self.relay, self._desk)
        with self._lock:
            self._connections.add(connection)
        context.add_callback(connection.end)
        threading.Thread(target=connection.read, args=(messages,), name="insitu-read", daemon=True).start()
        try:
            if self._is_stopping:
                connection.end()
            yield from connection.replies()
        except Rejected as rejected:
            context.abort(rejected.code, rejected.text)
        finally:
            self._desk.left(connection)
            with self._lock:
                self._connections.discard(connection)

    def Clock(self, query: ClockQuery, context: Any) -> ClockReading:
        """Say what this host's clock shows."""
        came_ns = time.monotonic_ns()
        return ClockReading(boot_id=self._boot_id, came_ns=came_ns, left_ns=time.monotonic_ns())

    def ShowRules(self, query: RulesQuery, context: Any) -> RulesAnswer:
        """Say which rules the ranks of a run follow."""
        return self._at_desk(context, lambda _: self._desk.show(query.run))

    def SetRules(self, order: RulesOrder, context: Any) -> RulesAnswer:
        """Let the ranks of a run follow other rules."""
        return self._at_desk(context, lambda peer: self._desk.set(order, peer))

    def _at_desk(self, context: Any, serve: Callable[[str], RulesAnswer]) -> RulesAnswer:
        remedy = "rules are for callers on the collector's own host; run `insitu rules` there"
        caller = self.gate.require(context, Role.ADMIN, remedy)
        try:
            return serve(caller.name)
        except RulesRefused as refused:
            context.abort(refused.code, refused.text)
            raise  # abort has raised

    def _write_event(self, kind: str, text: str) -> None:
        self.ingest.write_own("events", [{"t_ns": time.monotonic_ns(), "kind": kind, "step_id": -1, "text": text}])
        self._appended()

    def _appended(self) -> None:
        with self._due:
            self._has_uncommitted = True
            self._due.notify_all()

    def _commit_loop(self) -> None:
        while not self._is_stopping:
            with self._due:
                self._due.wait_for(lambda: self._has_uncommitted or self._is_stopping, IDLE_TICK_S)
                if self._has_uncommitted:
                    self._due.wait_for(self._is_commit_due, COMMIT_S)
                self._has_uncommitted = False
            self.relay.look()
            self._commit()

    def _is_commit_due(self) -> bool:
        return self._is_stopping or self.ingest.unsynced_bytes >= COMMIT_BYTES

    def _commit(self) -> None:
        try:
            failed = self.ingest.commit()
        except Exception:
            _log.exception("insitu: a commit failed; the next one may do better")
            return
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            self._send_again(connection, failed)
            connection.notify()

    def _send_again(self, connection: Connection, failed: list[Key]) -> None:
        for key in failed:
            if key.epoch == connection.epoch:
                connection.send_again(key.stream, key.seq)

    def stop(self) -> None:
        """Stop accepting, commit and acknowledge what came, seal. Safe to call twice."""
        if self._is_stopping:
            return
        stopped = self._grpc.stop(STOP_S)
        self._is_stopping = True
        self._appended()
        self._committer.join()
        self.relay.finish()
        self._commit()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.end()
        stopped.wait()
        self.ingest.close()
