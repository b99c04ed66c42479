"""One probe's connection: frames in on one thread, acknowledgements out on another."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import grpc

from insitu.exporters.base import Refused
from insitu.identity import boot_id
from insitu.records import spec_by_digest
from insitu.segments.layout import is_full
from insitu.vocabulary import DropReason, FrameDefect, HangUp
from insitu.wire.insitu_pb2 import (
    DURABLE,
    RECEIVED,
    Ack,
    Frame,
    Hello,
    Level,
    Refusal,
    Rules,
    ToCollector,
    ToProbe,
)
from insitu_collector.access.gate import Caller
from insitu_collector.access.tenants import Tenants
from insitu_collector.admission.admission import Admission, Rejected
from insitu_collector.flight.relay import FlightRelay
from insitu_collector.service.frame_check import Invalid
from insitu_collector.service.ingest import Ingest
from insitu_collector.service.rule_desk import RuleDesk

PROTOCOL: Final = 1
MAX_REFUSALS: Final = 1024
"""Unread refusals after which a connection is ended: its peer sends nonsense and does not listen."""

_log = logging.getLogger("insitu")


class Connection:
    """Takes the messages of one `Ship` call, and says what became of them.

    `read` runs on its own thread, `replies` on the call's; `notify` may be called by any.
    """

    def __init__(
        self,
        ingest: Ingest,
        on_append: Callable[[], None],
        relay: FlightRelay,
        desk: RuleDesk,
        caller: Caller,
        tenants: Tenants,
        admission: Admission,
    ) -> None:
        """Raises Rejected when there is no place for one more stream of this tenant; `leave` follows otherwise."""
        self.tenant = caller.tenant
        """Whose the records are."""
        self._tenants = tenants
        self.epoch: int | None = None
        self.source: Mapping[str, str] = {}
        """What Hello said of the process."""
        self._ingest = ingest
        self._counts = ingest.health.counts
        self._limits = admission.limits
        self._has_our_clock = False
        self._on_append = on_append
        self._relay = relay
        self._desk = desk
        self._changed = threading.Condition()
        self._refusals: deque[Refusal] = deque()
        self._pushed: deque[ToProbe] = deque()
        self._streams: set[int] = set()
        self._told: dict[int, tuple[int, int]] = {}
        self._late: set[int] = set()
        """Streams of which a frame came behind an acknowledgement that had passed it: what was said is said anew."""
        self._has_news = False
        self._no_more_frames = False
        self._must_end = False
        self._rejected: Rejected | None = None
        self._seat = admission.seat(self.tenant, self.reject)

    def may_be_cut_by(self, cut: Callable[[], object]) -> None:
        """cut: ends the call where its peer neither speaks nor listens."""
        self._seat.cut = cut

    def read(self, messages: Iterator[ToCollector]) -> None:
        """Take messages until the peer stops, or until one cannot be taken now."""
        try:
            self._hello(next(messages, None))
            while self._seat.wait_for_room() and (message := next(messages, None)) is not None:
                self._seat.heard()
                if self._rejected is not None or not self._take_message(message):
                    break
        except Rejected as rejected:
            self.reject(rejected)
        except grpc.RpcError:  # the peer went away: what it sent is stored, what it did not, it sends again
            pass
        except Exception:
            _log.exception("insitu: a connection is ended; the others go on")
            self._must_end = True
        finally:
            self._relay.left(self.epoch, self.push)
            self._no_more_frames = True
            self.notify()

    def _hello(self, message: ToCollector | None) -> None:
        if message is None or message.WhichOneof("m") != "hello":
            raise Rejected(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be Hello", HangUp.PROTOCOL)
        hello: Hello = message.hello
        if hello.protocol != PROTOCOL:
            text = f"this collector speaks protocol {PROTOCOL}, the probe {hello.protocol}; update the older one"
            raise Rejected(grpc.StatusCode.FAILED_PRECONDITION, text, HangUp.PROTOCOL)
        self._check_labels(hello.source)
        if not self._tenants.claim(hello.epoch, self.tenant):
            text = "this process's records belong to another tenant; use the token that it began with"
            raise Rejected(grpc.StatusCode.PERMISSION_DENIED, text, HangUp.OTHER_TENANT)
        self._seat.introduced()
        self.epoch = hello.epoch
        self._has_our_clock = hello.source.get("boot_id") == boot_id()
        self._relay.joined(hello, self.push, self.tenant)
        unknown = [digest.hex() for digest in hello.schemas if spec_by_digest(int.from_bytes(digest, "big")) is None]
        source = self.source = dict(hello.source)
        _log.log(
            logging.DEBUG if self._ingest.knows(hello.epoch) else logging.INFO,
            "insitu: %s (rank %s, process %s) connected%s",
            source.get("role", "?"),
            source.get("rank", "?"),
            source.get("pid", "?"),
            f"; its schemas {', '.join(unknown)} are unknown here" if unknown else "",
        )
        self._desk.joined(self)

    def _check_labels(self, source: Mapping[str, str]) -> None:
        most, most_bytes = self._limits.labels, self._limits.label
        longest = max((len(text.encode()) for label in source.items() for text in label), default=0)
        if len(source) > most or longest > most_bytes:
            text = f"{len(source)} labels, the longest {longest} bytes; at most {most} of {most_bytes} bytes"
            raise Rejected(grpc.StatusCode.INVALID_ARGUMENT, text, HangUp.LABELS)

    def _take_message(self, message: ToCollector) -> bool:
        """Take what follows Hello; return False when this connection must end and be made anew. Raises Rejected."""
        kind = message.WhichOneof("m")
        if kind == "rules":
            self._desk.reported(self, message.rules)
        elif kind == "frame":
            return self._admit(message.frame)
        elif kind is None:  # of a later version: it can be done without
            self._counts.refused(DropReason.REFUSED_INVALID, 0, message.ByteSize(), FrameDefect.UNKNOWN_KIND)
        else:
            raise Rejected(grpc.StatusCode.INVALID_ARGUMENT, "only frames may follow Hello", HangUp.PROTOCOL)
        return True

    def _admit(self, frame: Frame) -> bool:
        """Store one frame if quota and memory allow it now."""
        body = frame.body  # once: each look at it is a copy
        num_bytes = len(body)
        try:
            refused = self._seat.hold(num_bytes, frame.num_rows)
            if refused is not None:
                self._counts.refused(refused, frame.num_rows, num_bytes)
                self._refuse(frame.stream, frame.seq, refused, retry=True)
                return False
            return self._take(frame, body)
        finally:
            self._seat.let_go(num_bytes)

    def _take(self, frame: Frame, body: bytes) -> bool:
        assert self.epoch is not None, "Hello came first"
        try:
            stored = self._ingest.take(self.epoch, frame, self.tenant, body)
            self._counts.took(self.tenant, stored, has_our_clock=self._has_our_clock)
            self._streams.add(frame.stream)
            if frame.seq <= self._told.get(frame.stream, (-1, -1))[1]:
                self._late.add(frame.stream)
            self._relay.took(self.epoch, frame, self.tenant)
            self._on_append()
        except Refused as refused:
            _log.warning("insitu: refused frame %d of stream %d: %s", frame.seq, frame.stream, refused)
            defect = refused.defect if isinstance(refused, Invalid) else None
            self._counts.refused(refused.reason, frame.num_rows, len(body), defect)
            self._refuse(frame.stream, frame.seq, refused.reason, retry=False)
            self._ingest.skip(self.epoch, frame.stream, frame.seq)  # after: no acknowledgement may come before it
        except OSError as error:
            # Later frames must not overtake this one, so the connection ends with it.
            reason = DropReason.DISK_FULL if is_full(error) else DropReason.STORE_FAILED
            self._counts.refused(reason, frame.num_rows, len(body))
            self._refuse(frame.stream, frame.seq, reason, retry=True)
            self._on_append()
            return False
        self.notify()
        if len(self._refusals) < MAX_REFUSALS:
            return True
        self._counts.hung_up(HangUp.REFUSALS)
        return False

    def _refuse(self, stream: int, seq: int, reason: DropReason, *, retry: bool) -> None:
        self._refusals.append(Refusal(stream=stream, seq=seq, reason=str(reason), retry=retry))

    def send_again(self, stream: int, seq: int) -> None:
        """A frame of this connection could not be made durable: ask for it again, on a new connection."""
        self._refuse(stream, seq, DropReason.STORE_FAILED, retry=True)
        self.end()

    def reject(self, rejected: Rejected) -> None:
        """Say what is known, then end the call with this, or with what was said before. Any thread."""
        self._rejected = self._rejected or rejected
        self.end()

    def leave(self) -> None:
        """The call has ended."""
        self._seat.leave()

    def push(self, message: ToProbe) -> None:
        """Say something that is no answer. Any thread."""
        self._pushed.append(message)
        self.notify()

    def ask(self, question: Rules) -> None:
        """Hand rules down, or ask about them; the desk gets the report."""
        self._pushed.append(ToProbe(rules=question))
        self.notify()

    def notify(self) -> None:
        """Something was received or became durable."""
        with self._changed:
            self._has_news = True
            self._changed.notify_all()

    def revoke(self) -> None:
        """The caller may not call any more: take nothing further, say what is known, end the call."""
        text = "what let this caller in has expired or is not in the tokens file any more; use another token"
        self._rejected = Rejected(grpc.StatusCode.UNAUTHENTICATED, text, HangUp.REVOKED)
        self.end()

    def end(self) -> None:
        """Say what is known, then end the call."""
        self._must_end = True
        self._seat.end()
        self.notify()

    def replies(self) -> Iterator[ToProbe]:
        """Yield refusals and acknowledgements until the peer has stopped and knows all. Raises Rejected."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news)
                self._has_news = False
                is_last = self._must_end or (self._no_more_frames and self._is_settled())
            acks = list(self._acks())
            while self._refusals:
                yield ToProbe(refusal=self._refusals.popleft())
            while self._pushed:
                yield self._pushed.popleft()
            yield from acks
            if self._rejected is not None:
                raise self._rejected
            if is_last:
                return

    def _acks(self) -> Iterator[ToProbe]:
        assert self.epoch is not None or not self._streams, "frames follow Hello"
        for stream in sorted(self._streams):
            if stream in self._late:
                self._late.discard(stream)
                self._told.pop(stream, None)
            received, durable = self._ingest.reached(self.epoch or 0, stream)
            told_received, told_durable = self._told.get(stream, (-1, -1))
            self._told[stream] = (received, durable)
            if received > max(told_received, durable):
                yield self._ack(stream, received, RECEIVED)
            if durable > told_durable:
                yield self._ack(stream, durable, DURABLE)

    def _is_settled(self) -> bool:
        reached = (self._ingest.reached(self.epoch or 0, stream) for stream in self._streams)
        return all(received == durable for received, durable in reached)

    def _ack(self, stream: int, seq: int, level: Level) -> ToProbe:
        return ToProbe(ack=Ack(stream=stream, seq=seq, level=level, window_bytes=self._seat.window_bytes()))
