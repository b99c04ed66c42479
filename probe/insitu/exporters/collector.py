"""`grpc://` and `grpcs://`: ships to a collector, keeps what is not acknowledged, sends it again after a reconnect."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc

from insitu import forks
from insitu.credentials import NONE, CredentialError, Credentials
from insitu.exporters.base import Ack, Batch, Level, Refused, Retry
from insitu.exporters.clock_exchange import EVERY_S
from insitu.exporters.clocks import compare_clocks
from insitu.exporters.relay import NoRelay, RelayedCall, RelayError
from insitu.exporters.rules import FOLLOWS_RULES, answer
from insitu.exporters.window import Pending, Window
from insitu.identity import Source
from insitu.records import TABLES, table_spec
from insitu.vocabulary import DropReason
from insitu.wire.address import Address
from insitu.wire.channel import open_channel
from insitu.wire.insitu_pb2 import Dump, Hello, RulesReport, ToCollector, ToProbe
from insitu.wire.insitu_pb2_grpc import CollectorStub
from insitu.wire.refusals import why_refused

if TYPE_CHECKING:
    from insitu.rules.changes import RuleChanges

PROTOCOL: Final = 1
WINDOW_BYTES: Final = 16 << 20
"""Most that was taken here and is not known to be durable. What is more waits in the session's queue, whose bound,
`max_queue_bytes`, is of both; `forward` has no more in memory than this."""
MAX_BODY_BYTES: Final = 32 << 20
"""The collector's limit for one frame."""
RETRY_S: Final = 0.2
"""When the caller should try again with a full window."""
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0
_KEPT: Final = ", as far as max_queue_bytes or a spool has room"
"""Of records, while nobody takes them: the window here is no bound of its own."""

_OPTIONS: Final = (
    ("grpc.max_send_message_length", MAX_BODY_BYTES + (1 << 16)),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel really dials anew
    ("grpc.keepalive_time_ms", 10_000),  # a collector that vanished without a word is noticed
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # a minute otherwise, whatever the line above says
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the longest that one attempt to connect takes: 20 s otherwise
    ("grpc.enable_retries", 0),
)

_log = logging.getLogger("insitu")
_in_use: dict[int, tuple[Any, ...]] = {}
"""Channels and calls not hung up yet. A forked child keeps its parent's here, untouched: were they collected there,
gRPC would try to cancel them, on threads the child does not have."""


class CollectorExporter:
    """Ships batches over one `Ship` call, made at the first export in the process that uses it.

    `export` never waits: it takes a batch into the window, or raises `Retry` when the window is full or the collector
    is away. The window survives the collector; after a reconnect everything in it is sent again. In a forked child
    the first call begins anew, with an empty window.
    """

    def __init__(
        self,
        target: str,
        source: Source,
        *,
        window_bytes: int = WINDOW_BYTES,
        tell: Callable[[Sequence[dict[str, Any]]], None] | None = None,
        asked: Callable[[Dump], None] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        clock_every_s: float = EVERY_S,
        changes: Callable[[], RuleChanges | None] | None = None,
        credentials: Credentials = NONE,
    ) -> None:
        """target: HOST:PORT, with TLS grpcs://HOST:PORT. tell: takes rows of `clocks`, where that is on another host.

        clock: ns, of this host, read for them. clock_every_s: how often.
        changes: the rules that the collector may change; None: it may not.
        asked: takes what the collector asks the flight recorder for, on the shipping thread. credentials: what the
        collector is shown; read anew at each connection. Raises ValueError for a target without a port.
        """
        self._address = Address.of(target)
        self._target = self._address.target
        self._credentials = credentials
        self._source = source
        self._own_window_bytes = window_bytes
        self._tell = tell
        self._asked = asked
        self._clock = clock
        self._clock_every_s = clock_every_s
        self._changes = changes
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._window = Window()
        self._window_bytes = self._own_window_bytes
        self._unsent: deque[Pending] = deque()
        self._reports: deque[RulesReport] = deque()
        self._thread: threading.Thread | None = None
        self._epoch = self._source.epoch
        self._call: Any = None
        self._connection = 0
        """Counts connections, so that the sender of an old one knows that it is old."""
        self._away_because: DropReason | None = None
        """Why the collector takes nothing now; None while it does, and before the first attempt."""
        self._is_put_off = False
        """Whether this connection is one of which the collector said that it takes no more now."""
        self._closing = threading.Event()
        self._is_forking = False
        """Whether this connection is ended, or one that is being made is not begun, because somebody forks."""
        self._last_said = ""
        self._barred = ""

    # -- what the drain thread calls ---------------------------------------------------------------

    def export(self, batch: Batch) -> Ack:
        """Take one batch into the window; see `Exporter.export`."""
        self._in_this_process()
        num_bytes = len(batch.body)
        if num_bytes > MAX_BODY_BYTES:
            raise Refused(DropReason.REFUSED_INVALID, f"a batch of {num_bytes} bytes; the most is {MAX_BODY_BYTES}")
        with self._changed:
            if self._closing.is_set():
                raise Refused(DropReason.SHUTDOWN)
            # One batch is taken in any case: its acknowledgement is what shows that the collector is back.
            if len(self._window):
                if self._away_because is not None:
                    raise Retry(RETRY_S, self._away_because)
                if self._window.num_bytes + num_bytes > self._window_bytes:
                    raise Retry(RETRY_S, DropReason.QUEUE_FULL)
            pending = Pending.of(batch)
            self._window.add(pending)
            self._unsent.append(pending)
            self._changed.notify_all()
            level = self._window.level(batch.stream, batch.seq)
        if self._thread is None:
            self._epoch = batch.epoch
            self._thread = threading.Thread(target=self._ship_until_closed, name="insitu-ship", daemon=True)
            self._thread.start()
        return Ack(batch.stream, batch.seq, level)

    def durable(self, stream: int) -> int:
        """Return the highest seq acknowledged as durable, or -1. A refused batch holds it back until reported."""
        self._in_this_process()
        with self._changed:
            return self._window.durable(stream)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, what the collector refused for good."""
        self._in_this_process()
        with self._changed:
            refused = self._window.take_refused()
            self._changed.notify_all()
            return refused

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is durable; False when time ran out or a refusal waits to be read."""
        self._in_this_process()
        with self._changed:
            self._changed.wait_for(lambda: not len(self._window), max(0.0, timeout_s))
            return self._window.is_settled

    @property
    def is_away(self) -> bool:
        """Whether the collector takes nothing now; False before the first attempt."""
        return self._away_because is not None

    @property
    def barred(self) -> str:
        """Why the collector does not let this process in, as one line; empty where that is not what is wrong."""
        return self._barred

    @property
    def num_acks(self) -> int:
        """Acknowledgements so far: whether it says anything at all."""
        return self._window.num_acks

    @property
    def num_unacknowledged(self) -> int:
        """Batches that are not known to be durable."""
        return len(self._window)

    def unacknowledged(self) -> list[Pending]:
        """Return them, in the order they were exported."""
        with self._changed:
            return self._window.in_order()

    def close(self, timeout_s: float) -> None:
        """Flush within the deadline, hang up, end the thread. Safe to call twice."""
        if self._pid != os.getpid():
            return
        deadline = time.monotonic() + timeout_s
        self.flush(timeout_s)
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        thread = self._thread
        if thread is not None:
            thread.join(max(0.1, min(1.0, deadline - time.monotonic())))
            if thread.is_alive() and self._call is not None:
                self._call.cancel()
            thread.join(1.0)

    def _in_this_process(self) -> None:
        if self._pid != os.getpid():
            self._begin()

    # -- the shipping thread -----------------------------------------------------------------------

    def _ship_until_closed(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._closing.is_set():
            is_broken = True
            try:
                self._is_forking = False
                with forks.Turn(self._hang_up_to_fork):
                    self._connect_and_listen()
                is_broken = False
                if self._away_because is None and not self._closing.is_set() and not self._is_forking:
                    self._say(logging.WARNING, f"collector {self._target} hung up; its records are sent again")
            except grpc.RpcError as error:
                if not self._is_forking:
                    self._note_error(error)
            except CredentialError as error:
                self._note_barred(str(error))
            except NoRelay as error:
                self._say(
                    logging.WARNING, f"no process is to be had to ship for this forked one ({error}); tried again"
                )
            except Exception:
                _log.exception("insitu: shipping to %s failed; it is tried again", self._target)
            if self._is_forking:
                continue
            if self._away_because is None:  # it took something meanwhile
                backoff_s = FIRST_BACKOFF_S
            elif self._barred:  # until somebody changes a file, asking again changes nothing
                backoff_s = MAX_BACKOFF_S
            if is_broken or self._away_because is None:
                self._away_because = DropReason.COLLECTOR_UNREACHABLE
            self._closing.wait(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)

    def _hang_up_to_fork(self) -> None:
        """Have the connection end, for another thread is about to fork: it is made again at once."""
        self._is_forking = True
        if (call := self._call) is not None:
            call.cancel()

    def _connect_and_listen(self) -> None:
        """Ship until the call ends. Raises RpcError when it breaks."""
        with self._changed:
            if self._closing.is_set():
                return
            self._connection += 1
            self._is_put_off = False
            self._unsent = deque(self._window.in_order())
            self._reports.clear()  # they answer the connection before
            number = self._connection
        channel: grpc.Channel | None = None
        if forks.is_grpc_lost():
            self._call = RelayedCall(self._address, self._credentials, _OPTIONS, self._messages(number))
        else:
            channel = open_channel(self._address, self._credentials, _OPTIONS)
            self._call = CollectorStub(channel).Ship(self._messages(number))
            self._compare_clocks(channel, number)
        call = self._call
        if self._is_forking:
            call.cancel()
        _in_use[id(call)] = (channel, call)
        try:
            for reply in call:
                self._on_reply(reply)
        finally:
            with self._changed:
                self._connection += 1  # ends the sender of this one
                self._changed.notify_all()
            call.cancel()
            if channel is not None:
                channel.close()
            del _in_use[id(call)]

    def _compare_clocks(self, channel: grpc.Channel, number: int) -> None:
        """Compare them as long as this connection lasts; a forked child's are those of its parent."""
        if self._tell is None:
            return
        compare = partial(compare_clocks, channel, self._source.boot_id, self._clock, self._tell)
        threading.Thread(target=compare, args=(partial(self._rest, number),), name="insitu-clock", daemon=True).start()

    def _messages(self, number: int) -> Iterator[ToCollector]:
        """Yield Hello, then frames as they come, until this connection is over. Runs on a thread of gRPC's."""
        yield ToCollector(
            hello=Hello(
                protocol=PROTOCOL,
                epoch=self._epoch,
                source=self._source.labels() | ({FOLLOWS_RULES: "1"} if self._changes is not None else {}),
                schemas=[table_spec(table).digest.to_bytes(8, "big") for table in TABLES],
            )
        )
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent or self._reports or self._is_over(number))
                if self._connection != number or not (self._unsent or self._reports):
                    return
                report = self._reports.popleft() if self._reports else None
                pending = None if report is not None else self._unsent.popleft()
            yield ToCollector(rules=report) if pending is None else ToCollector(frame=pending.frame())

    def _rest(self, number: int) -> bool:
        """Wait until clocks are to be compared again; True when the connection is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over(number), self._clock_every_s)

    def _is_over(self, number: int) -> bool:
        return self._closing.is_set() or self._connection != number

    def _on_reply(self, reply: ToProbe) -> None:
        kind = reply.WhichOneof("m")
        if kind == "ack":
            self._say(logging.INFO, f"connected to collector {self._target}")
            with self._changed:
                self._barred = ""
                if not self._is_put_off:  # else it is of what came before that
                    self._away_because = None
                if reply.ack.window_bytes:
                    self._window_bytes = min(self._own_window_bytes, reply.ack.window_bytes)
                self._window.acknowledge(reply.ack.stream, reply.ack.seq, Level(reply.ack.level))
                self._changed.notify_all()
        elif kind == "refusal" and reply.refusal.retry:
            # The collector ends the call after this; everything not durable is sent again after a pause.
            self._is_put_off = True
            self._away_because = _reason(reply.refusal.reason)
            self._say(logging.WARNING, f"collector {self._target} cannot store now ({reply.refusal.reason})")
        elif kind == "refusal":
            with self._changed:
                self._window.refuse(reply.refusal.stream, reply.refusal.seq, _reason(reply.refusal.reason))
                self._changed.notify_all()
        elif kind == "dump" and self._asked is not None:
            self._asked(reply.dump)
        elif kind == "rules" and self._changes is not None:
            report = answer(reply.rules, self._changes())
            with self._changed:
                self._reports.append(report)
                self._changed.notify_all()

    def _note_error(self, error: grpc.RpcError) -> None:
        status: Any = error  # what a call raises is itself the call
        code = status.code() if isinstance(status, grpc.Call | RelayError) else None
        port = self._target.rpartition(":")[2]
        if self._closing.is_set():
            return
        why = why_refused(self._address, code, (status.details() or "") if code else "")
        if why is not None:
            self._note_barred(why)
            return
        self._barred = ""
        if code is grpc.StatusCode.UNIMPLEMENTED:
            self._say(
                logging.ERROR,
                f"{self._target}: an OpenTelemetry collector listens there; start `insitu collect --port 4327`, "
                "or use to=otlp://",
            )
        elif code is grpc.StatusCode.UNAVAILABLE:
            self._say(
                logging.WARNING,
                f"no collector at {self._target}; records are kept{_KEPT}, and "
                f"shipped when one is started: insitu collect --store DIR --port {port}",
            )
        else:
            said = f"{code.name.lower()}: {status.details()}" if code else str(error)
            self._say(logging.ERROR, f"collector {self._target} refuses this probe ({said}); it is tried again")

    def _note_barred(self, why: str) -> None:
        self._barred = why
        self._say(logging.ERROR, f"{why}. Records are kept meanwhile{_KEPT}")

    def _say(self, level: int, text: str) -> None:
        """Log a change of state, once."""
        if text != self._last_said:
            self._last_said = text
            _log.log(level, "insitu: %s", text)


def _reason(text: str) -> DropReason:
    try:
        return DropReason(text)
    except ValueError:
        return DropReason.REFUSED_INVALID
