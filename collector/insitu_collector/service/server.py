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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from insitu.identity import boot_id
from insitu.intake import MAX_FRAME_BYTES, Intake
from insitu.segments.recovery import Recovery, recover_store
from insitu.segments.retention import Keep
from insitu.segments.shard import Key, ShardWriter
from insitu.vocabulary import HangUp
from insitu.wire.address import PLAIN, SECURE
from insitu.wire.channel import STORE_ID
from insitu.wire.insitu_pb2 import (
    ClockQuery,
    ClockReading,
    HealthAnswer,
    HealthQuery,
    RulesAnswer,
    RulesOrder,
    RulesQuery,
    ToCollector,
    ToProbe,
)
from insitu.wire.insitu_pb2_grpc import (
    CollectorServicer,
    add_CollectorServicer_to_server,
    add_QueryServicer_to_server,
)
from insitu_collector.access.audit import Why
from insitu_collector.access.children import Child, let_in
from insitu_collector.access.gate import Access, Caller, Gate, Role
from insitu_collector.access.tenants import Tenants, owners_in
from insitu_collector.admission.admission import Admission, Rejected
from insitu_collector.flight.relay import FlightRelay
from insitu_collector.health.health import Health
from insitu_collector.health.service import StatusService, answer_of
from insitu_collector.keeping.keeper import Keeper
from insitu_collector.keeping.merge_plan import IN_BACKGROUND
from insitu_collector.keeping.places import warn_of_remote
from insitu_collector.service.connection import Connection
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.service.query_service import QueryService
from insitu_collector.service.rule_desk import RuleDesk, RulesRefused
from insitu_collector.service.store_id import store_id
from insitu_collector.store import Store

if TYPE_CHECKING:
    from insitu_collector.otlp.service import Otlp

COMMIT_S: Final = 0.05
COMMIT_BYTES: Final = 8 << 20
AWAITED_S: Final = 0.01
"""How long a commit waits for more, once somebody who sends nothing before it is answered waits for it."""
IDLE_TICK_S: Final = 1.0
"""How often files are sealed by age when nothing arrives."""
SPARE_CALLS: Final = 64
"""Calls at once beyond the streams: clocks, rules, health, and streams that are told that there is no place."""
STOP_S: Final = 3.0

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

    Raises PortInUse; BadTokens and BadCertificate; ShardLocked when another collector writes the store; StoreFull;
    OSError when the store cannot be written.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        host: str = "127.0.0.1",
        port: int = 4317,
        keep: Keep | None = None,
        access: Access | None = None,
        intake: Intake | None = None,
        health: Health | None = None,
        *,
        has_children: bool = False,
        compact: bool = True,
        otlp_http: socket.socket | None = None,
    ) -> None:
        """access: who may call; None: anybody may ship, and callers on this host may do everything.

        health: where to tell how it goes, for somebody who watches from the very start. has_children: there will be
        processes for `child`. compact: merge small segments now and then, and write twins of them. otlp_http: a
        socket that listens, to take OTLP/HTTP on.
        """
        self.store = Path(store)
        self.gate = Gate(access, partial(self._write_event, "audit"))
        self.health = health or Health(self.store, keep or Keep())
        self._admission = Admission(intake)
        self.health.load = self._admission.load
        self._is_started = self._is_stopping = self._has_uncommitted = self._is_awaited = False
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._due = threading.Condition()
        self._boot_id = boot_id()
        _check_port(host, port)  # before the store is touched
        self._grpc = self._make_grpc()
        self.otlp = self._add_otlp()
        self.port = self._bind(host, port, self.gate.credentials())
        is_guarded = has_children and self.gate.is_guarded
        self._child_port = self._bind("127.0.0.1", 0, None) if is_guarded else None
        self.address = f"{SECURE if self.gate.access.tls else PLAIN}://{host}:{self.port}"
        self._grpc.start()  # says that it is not ready, until it is
        try:
            writer = self._recover(keep)
        except BaseException:
            self._grpc.stop(None).wait()
            raise
        self.relay = FlightRelay(self.ingest.write_own)
        self._desk = RuleDesk(self._write_event)
        self._committer = threading.Thread(target=self._commit_loop, name="insitu-commit", daemon=True)
        self._committer.start()
        self._keeper = Keeper(writer, self.ingest, self._appended, rules=IN_BACKGROUND if compact else None)
        self._keeper.start()
        self._is_started = True
        if self.otlp is not None:
            self.otlp.begin(self.ingest, otlp_http)
        self.health.readiness.started()

    def _recover(self, keep: Keep | None) -> ShardWriter:
        """Make the store whole, and what takes frames into it."""
        writer = ShardWriter(self.store, SHARD)
        warn_of_remote(self.store)
        try:
            max_bytes = self._admission.limits.frame
            self.ingest = Ingest(writer, keep=keep, health=self.health, max_frame_bytes=max_bytes)
            _report(writer.recovery)
            others = recover_store(self.store)
            self.ingest.lost(others.damage)
            _report(others)
            self._store_id = store_id(self.store)
            self._tenants = Tenants(owners_in(Store(self.store)) if self.gate.access.tokens else None)
        except BaseException:
            writer.close()
            raise
        return writer

    def _make_grpc(self) -> grpc.Server:
        limits = self._admission.limits
        # A stream holds one worker for its life, so there are more workers than streams: nobody else starves.
        num_calls = limits.streams + SPARE_CALLS
        pool = ThreadPoolExecutor(num_calls, thread_name_prefix="insitu-ship")
        options = (
            *_OPTIONS,
            ("grpc.server_handshake_timeout_ms", round(1000 * limits.handshake)),
            ("grpc.max_concurrent_streams", num_calls),  # of one connection: its peer's further calls wait there
        )
        server = grpc.server(pool, options=options, maximum_concurrent_rpcs=num_calls)
        add_CollectorServicer_to_server(self, server)
        self.health.readiness.tell(StatusService(server).on_change)
        self._query = QueryService(self.store, self.gate)
        add_QueryServicer_to_server(self._query, server)
        return server

    def _add_otlp(self) -> Otlp | None:
        try:
            from insitu_collector.otlp.service import Otlp
        except ModuleNotFoundError as error:
            _log.warning("insitu: no OTLP is received, %s is missing; pip install 'insitu[collector]'", error.name)
            return None
        on_append = partial(self._appended, is_awaited=True)
        otlp = Otlp(self.gate, self._admission, self.health.counts, on_append, self._write_event)
        otlp.add_to(self._grpc)
        return otlp

    def _bind(self, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
        try:
            if credentials is None:
                bound = self._grpc.add_insecure_port(f"{host}:{port}")
            else:
                bound = self._grpc.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError:
            bound = 0
        if not bound:
            raise PortInUse(errno.EADDRINUSE, "address already in use", f"{host}:{port}")
        return int(bound)

    @contextmanager
    def child(self, name: str, *roles: Role) -> Iterator[Child]:
        """Yield what a process that the collector starts needs to call it: without TLS, which never leaves the host."""
        if self._child_port is None:
            yield Child(self.address)
        else:
            with let_in(self.gate, f"{PLAIN}://127.0.0.1:{self._child_port}", name, *roles) as child:
                yield child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def Ship(self, messages: Iterator[ToCollector], context: Any) -> Iterator[ToProbe]:
        """Serve one probe (see insitu.proto)."""
        caller = self.gate.require(context, Role.SHIP, "records are for callers that may ship")
        connection = self._let_in(context, caller)
        if self._store_id is not None:
            context.send_initial_metadata(((STORE_ID, self._store_id),))
        with self._lock:
            self._connections.add(connection)
        connection.may_be_cut_by(context.cancel)
        context.add_callback(connection.end)
        threading.Thread(target=connection.read, args=(messages,), name="insitu-read", daemon=True).start()
        try:
            if self._is_stopping:
                connection.end()
            with self.gate.watched(caller, connection.revoke):
                yield from connection.replies()
        except Rejected as rejected:
            if rejected.code is grpc.StatusCode.PERMISSION_DENIED:
                self.gate.refuse(caller, Why.OTHER_TENANT)
            self._hang_up(context, rejected)
        finally:
            connection.leave()
            self._desk.left(connection)
            with self._lock:
                self._connections.discard(connection)

    def _let_in(self, context: Any, caller: Caller) -> Connection:
        try:
            self._check_started()
            return Connection(
                self.ingest, self._appended, self.relay, self._desk, caller, self._tenants, self._admission
            )
        except Rejected as rejected:
            self._hang_up(context, rejected)
            raise  # abort has raised

    def _check_started(self) -> None:
        if not self._is_started:
            text = "this collector recovers its store; it takes records in a moment"
            raise Rejected(grpc.StatusCode.UNAVAILABLE, text, HangUp.STARTING)

    def _hang_up(self, context: Any, rejected: Rejected) -> None:
        self.health.counts.hung_up(rejected.why)
        context.abort(rejected.code, rejected.text)

    def Clock(self, query: ClockQuery, context: Any) -> ClockReading:
        """Say what this host's clock shows."""
        came_ns = time.monotonic_ns()
        self.gate.caller(context)
        return ClockReading(boot_id=self._boot_id, came_ns=came_ns, left_ns=time.monotonic_ns())

    def Health(self, query: HealthQuery, context: Any) -> HealthAnswer:
        """Say whether records can be stored, and what was taken, refused and lost."""
        self.gate.caller(context)
        return answer_of(self.health.report())

    def ShowRules(self, query: RulesQuery, context: Any) -> RulesAnswer:
        """Say which rules the ranks of a run follow."""
        return self._at_desk(context, lambda caller: self._desk.show(query.run, caller.tenant))

    def SetRules(self, order: RulesOrder, context: Any) -> RulesAnswer:
        """Let the ranks of a run follow other rules."""
        return self._at_desk(context, lambda caller: self._desk.set(order, str(caller), caller.tenant))

    def _at_desk(self, context: Any, serve: Callable[[Caller], RulesAnswer]) -> RulesAnswer:
        remedy = "rules are for callers on the collector's own host; run `insitu rules` there"
        caller = self.gate.require(context, Role.ADMIN, remedy)
        try:
            self._check_started()
            return serve(caller)
        except (RulesRefused, Rejected) as refused:
            context.abort(refused.code, refused.text)
            raise  # abort has raised

    def _write_event(self, kind: str, text: str) -> None:
        self.ingest.write_own("events", [{"t_ns": time.monotonic_ns(), "kind": kind, "step_id": -1, "text": text}])
        self._appended()

    def _appended(self, *, is_awaited: bool = False) -> None:
        with self._due:
            self._has_uncommitted = True
            self._is_awaited = self._is_awaited or is_awaited
            self._due.notify_all()

    def _commit_loop(self) -> None:
        while not self._is_stopping:
            with self._due:
                self._due.wait_for(lambda: self._has_uncommitted or self._is_stopping, IDLE_TICK_S)
                if self._has_uncommitted:
                    self._due.wait_for(lambda: self._is_awaited or self._is_commit_due(), COMMIT_S)
                if self._is_awaited:
                    self._due.wait_for(self._is_commit_due, AWAITED_S)
                self._has_uncommitted = self._is_awaited = False
            self._look()
            self._commit()
            self._admission.sweep()

    def _look(self) -> None:
        try:
            self.relay.look()
            self.gate.look()
        except Exception:
            _log.exception("insitu: what is looked at once a second failed; the next look may do better")

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
        self.health.readiness.stopping()
        stopped = self._grpc.stop(STOP_S)
        self._query.close()
        if self.otlp is not None:
            self.otlp.stop_taking()
        self._keeper.stop()
        self._is_stopping = True
        self._appended()
        self._committer.join()
        self.relay.finish()
        self.gate.look(is_last=True)
        self._commit()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.end()
        if self.otlp is not None:
            self.otlp.stop()
        stopped.wait()
        self.ingest.close()
