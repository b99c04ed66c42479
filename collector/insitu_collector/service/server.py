"""The collector as a gRPC server: connections, group commit, start and stop."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from insitu.identity import boot_id
from insitu.intake import Intake
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
from insitu_collector.service.due import Due
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.service.listening import bind, check_port, make_server
from insitu_collector.service.query_service import QueryService
from insitu_collector.service.rule_desk import RuleDesk, RulesRefused
from insitu_collector.service.store_id import store_id
from insitu_collector.store import Store

if TYPE_CHECKING:
    from insitu_collector.otlp.service import Otlp

STOP_S: Final = 3.0

_log = logging.getLogger("insitu")


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
        self._is_started = self._is_stopping = False
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._writer: ShardWriter | None = None
        self._due = Due()
        self._boot_id = boot_id()
        check_port(host, port)  # before the store is touched
        self._grpc = self._make_grpc()
        self.port = bind(self._grpc, host, port, self.gate.credentials())
        self.otlp = self._add_otlp()
        is_guarded = has_children and self.gate.is_guarded
        self._child_port = bind(self._grpc, "127.0.0.1", 0, None) if is_guarded else None
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
        self._keeper = Keeper(writer, self.ingest, self._due.appended, rules=IN_BACKGROUND if compact else None)
        self._keeper.start()
        self._is_started = True
        if self.otlp is not None:
            self.otlp.begin(self.ingest, otlp_http)
        self.health.readiness.started()

    def _recover(self, keep: Keep | None) -> ShardWriter:
        """Make the store whole, and what takes frames into it."""
        writer = self._writer = ShardWriter(self.store, SHARD)
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

    def _store_has_gone(self) -> bool:
        return self._writer is not None and self._writer.has_gone()

    def _make_grpc(self) -> grpc.Server:
        server = make_server(self._admission.limits)
        add_CollectorServicer_to_server(self, server)
        self.health.readiness.tell(StatusService(server).on_change)
        self._query = QueryService(self.store, self.gate, has_gone=self._store_has_gone)
        add_QueryServicer_to_server(self._query, server)
        return server

    def _add_otlp(self) -> Otlp | None:
        try:
            from insitu_collector.otlp.service import Otlp
        except ModuleNotFoundError as error:
            _log.warning("insitu: no OTLP is received, %s is missing; pip install 'insitu[collector]'", error.name)
            return None
        on_append = partial(self._due.appended, is_awaited=True)
        otlp = Otlp(self.gate, self._admission, self.health.counts, on_append, self._write_event)
        otlp.add_to(self._grpc)
        return otlp

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
                self.ingest, self._due.appended, self.relay, self._desk, caller, self._tenants, self._admission
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
        self._due.appended()

    def _commit_loop(self) -> None:
        while not self._is_stopping:
            self._due.wait(lambda: self.ingest.unsynced_bytes)
            self._look()
            self._commit()
            self._admission.sweep()

    def _look(self) -> None:
        try:
            self.relay.look()
            self.gate.look()
        except Exception:
            _log.exception("insitu: what is looked at once a second failed; the next look may do better")

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
        self._query.end_followers()
        if self.otlp is not None:
            self.otlp.stop_taking()
        self._keeper.stop()
        self._is_stopping = True
        self._due.stop()
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
        self._query.close()
        self.ingest.close()
