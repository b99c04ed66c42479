"""Requests on their way to real receivers that misbehave on command: tried again, split, buried, never lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from subscriber_kit import letters
from target_kit import HANG, OK, TARGETS, Receiver, Say, tls_target
from test_otlp_payloads import items_of, request_of

from insitu_collector.subscriber.account import Account
from insitu_collector.subscriber.dead import DeadLetters, read
from insitu_collector.subscriber.delivery import HELD_EVENT, Delivery, GaveUp
from insitu_collector.subscriber.ends import open_end
from insitu_collector.subscriber.pace import Pace
from insitu_collector.subscriber.payloads import Payload, payload_of
from insitu_collector.subscriber.target import parse_target

pytestmark = pytest.mark.matrix

Code = grpc.StatusCode
UNAVAILABLE = Say(503, Code.UNAVAILABLE, text="busy")


class Clock:
    """Time that passes while somebody waits, and at no other time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waits: list[float] = []
        self.most = 50

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now_s += seconds
        return len(self.waits) >= self.most


@dataclass
class Sent:
    """A delivery with what it left."""

    delivery: Delivery
    store: Path
    to: str
    account: Account
    clock: Clock
    told: list[tuple[str, str]] = field(default_factory=list)

    def buried(self) -> list[tuple[str, int]]:
        return [(letter.reason, letter.num_items) for _, letter in letters(self.store, self.to)]


@pytest.fixture(params=TARGETS)
def receiver(request: pytest.FixtureRequest) -> Iterator[Receiver]:
    with TARGETS[request.param]() as found:
        yield found


@pytest.fixture
def sent(receiver: Receiver, tmp_path: Path) -> Iterator[Sent]:
    yield from sending(receiver.url, tmp_path)


def sending(
    url: str,
    store: Path,
    rate: int | None = None,
    give_up_s: float | None = None,
    more: Mapping[str, str] | None = None,
) -> Iterator[Sent]:
    settings = {"TIMEOUT": "20", **(more or {})}
    environment = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in settings.items()}
    account, clock = Account(), Clock()
    told: list[tuple[str, str]] = []
    with closing(open_end(parse_target(url, environment))) as end:
        delivery = Delivery(
            url,
            end,
            DeadLetters(store, url),
            account,
            pace=Pace(rate, clock),
            wait=clock.wait,
            tell=lambda kind, text: told.append((kind, text)),
            give_up_s=give_up_s,
            clock=clock,
            jitter=lambda: 1.0,
        )
        yield Sent(delivery, store, url, account, clock, told)


def spans(number: int = 4) -> Payload:
    return payload_of("traces", request_of("traces", [[number]]).SerializeToString())


@dataclass(frozen=True)
class Case:
    """What a receiver says to one request of four spans after another, and what comes of it."""

    name: str
    says: tuple[Say, ...]
    waits: tuple[float, ...] = ()
    taken: int = 4
    rejected: int = 0
    buried: tuple[tuple[str, str, int], ...] = ()
    """Reason over HTTP and over gRPC, and how many items."""
    num_told: int = 0


CASES = (
    Case("taken at once", (OK,)),
    Case("no token", (Say(401, Code.UNAUTHENTICATED),) * 3 + (OK,), (60.0,) * 3, num_told=1),
    Case("no permission", (Say(403, Code.PERMISSION_DENIED), OK), (60.0,), num_told=1),
    Case("busy, without a time", (UNAVAILABLE,) * 8 + (OK,), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)),
    Case("busy, with a time", (Say(503, Code.UNAVAILABLE, retry_s=17), OK), (17.0,)),
    Case("too many", (Say(429, Code.RESOURCE_EXHAUSTED, retry_s=5), Say(429, Code.ABORTED), OK), (5.0, 2.0)),
    Case("gateway", (Say(502, Code.ABORTED), Say(504, Code.DATA_LOSS), OK), (1.0, 2.0)),
    Case("too large once", (Say(413, Code.RESOURCE_EXHAUSTED), OK, OK)),
    Case("too large to the last", (Say(413, Code.RESOURCE_EXHAUSTED),) * 7, (), 0,
         buried=(("413", "RESOURCE_EXHAUSTED", 1),) * 4),
    Case("nonsense", (Say(400, Code.INVALID_ARGUMENT, text="no"),), (), 0, buried=(("400", "INVALID_ARGUMENT", 4),)),
    Case("nobody there", (Say(404, Code.UNIMPLEMENTED),), (), 0, buried=(("404", "UNIMPLEMENTED", 4),)),
    Case("partial success", (Say(num_rejected=3, text="too old"),), (), 1, rejected=3),
    Case("a warning", (Say(text="careful"),), ()),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row_26_each_answer_of_a_receiver_is_heeded(receiver: Receiver, sent: Sent, case: Case) -> None:
    receiver.answers.extend(case.says)
    assert sent.delivery.deliver(spans())
    assert sent.clock.waits == list(case.waits)
    assert receiver.num_asked == len(case.says), "nothing is sent again that was settled"
    assert (sent.account.sent["traces"], sent.account.rejected_items["traces"]) == (case.taken, case.rejected)
    place = 0 if sent.to.startswith("http") else 1
    assert sent.buried() == [(each[place], each[2]) for each in case.buried]
    assert case.taken + case.rejected + sum(number for *_, number in case.buried) == 4, "each item is in one place"
    assert [kind for kind, _ in sent.told] == [HELD_EVENT] * case.num_told
    if case.rejected or case.name == "a warning":
        assert sent.account.rejected_text == case.says[0].text
    receiver.answers.clear()
    assert sent.delivery.deliver(spans(1)), "whatever was said before, what comes after is sent"
    assert sent.account.sent["traces"] == case.taken + 1


def test_row_26_what_is_too_large_is_split_down_to_the_one_item_that_is_never_taken(
    receiver: Receiver, sent: Sent
) -> None:
    def choose(_: str, request: Any) -> Say:
        names = [span.name for span in request.resource_spans[0].scope_spans[0].spans]
        return Say(413, Code.RESOURCE_EXHAUSTED) if len(names) > 3 or "span 5" in names else OK

    receiver.choose = choose
    assert sent.delivery.deliver(spans(16))
    taken = {span.name for span in receiver.spans()}
    assert len(receiver.spans()) == len(taken) == 15
    ((path, letter),) = letters(sent.store, sent.to)
    found, payload = read(sent.store, path)
    assert (found, letter.num_items) == (letter, 1)
    assert [item[2] for item in items_of(payload)] == [items_of(spans(16))[4][2]]
    assert sent.account.num_split == receiver.num_asked - sent.account.num_requests - 1


@pytest.mark.parametrize("protocol", TARGETS)
def test_row_26_a_receiver_that_hangs_is_cut_off_and_tried_again(protocol: str, tmp_path: Path) -> None:
    with TARGETS[protocol]() as receiver:
        receiver.answers.extend([HANG, HANG])
        for sent in sending(receiver.url, tmp_path, more={"TIMEOUT": "0.3"}):
            assert sent.delivery.deliver(spans())
            assert sent.clock.waits == [1.0, 2.0]
            assert sent.account.num_retried == 2


@pytest.mark.parametrize("protocol", TARGETS)
def test_row_26_a_receiver_that_cannot_be_trusted_gets_nothing_and_is_told_of_once(
    protocol: str, tmp_path: Path
) -> None:
    trusted, foreign = trustme.CA(), trustme.CA()
    ca_file = tmp_path / "ca.pem"
    trusted.cert_pem.write_to_path(str(ca_file))
    with tls_target(protocol, foreign) as receiver:
        for sent in sending(receiver.url, tmp_path, more={"CERTIFICATE": str(ca_file)}):
            sent.clock.most = 3
            assert not sent.delivery.deliver(spans()), "it was asked to stop, and is not settled"
            assert sent.clock.waits == [60.0, 60.0, 60.0]
            assert [kind for kind, _ in sent.told] == [HELD_EVENT]
            assert "TLS" in sent.told[0][1]
            assert sent.account.is_now == "held"
            assert (receiver.num_asked, sent.buried()) == (0, [])
    with tls_target(protocol, trusted) as receiver:
        for sent in sending(receiver.url, tmp_path, more={"CERTIFICATE": str(ca_file)}):
            assert sent.delivery.deliver(spans())
            assert len(receiver.spans()) == 4


@pytest.mark.parametrize("protocol", TARGETS)
def test_row_26_a_receiver_that_asks_for_a_certificate_gets_it(protocol: str, tmp_path: Path) -> None:
    ca = trustme.CA()
    own = ca.issue_cert("subscriber@example.com")
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "own.pem"))
    own.private_key_pem.write_to_path(str(tmp_path / "own.key"))
    files = {
        "CERTIFICATE": str(tmp_path / "ca.pem"),
        "CLIENT_CERTIFICATE": str(tmp_path / "own.pem"),
        "CLIENT_KEY": str(tmp_path / "own.key"),
    }
    with tls_target(protocol, ca, asks=True) as receiver:
        for sent in sending(receiver.url, tmp_path, more=files):
            assert sent.delivery.deliver(spans())
            assert len(receiver.spans()) == 4


def test_nobody_at_the_address_is_waited_for_until_it_is_too_long(tmp_path: Path) -> None:
    for sent in sending("http://127.0.0.1:9", tmp_path, give_up_s=10.0):
        with pytest.raises(GaveUp, match=r"^unreachable: connection refused; start a receiver there, or name another$"):
            sent.delivery.deliver(spans())
        assert sent.clock.waits == [1.0, 2.0, 4.0, 8.0]


def test_headers_and_compression_go_along_and_headers_into_no_line(
    receiver: Receiver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers.extend([Say(401, Code.UNAUTHENTICATED), Say(400, Code.INVALID_ARGUMENT)])
    more = {"HEADERS": "authorization=Bearer%20s3cret", "COMPRESSION": "gzip"}
    with caplog.at_level(logging.DEBUG):
        for sent in sending(receiver.url, tmp_path, more=more):
            assert sent.delivery.deliver(spans())
            assert sent.delivery.deliver(spans())
            assert "s3cret" not in str(sent.told)
    (got,) = receiver.got("traces")
    assert got.headers["authorization"] == "Bearer s3cret"
    assert "gzip" in (got.headers.get("content-encoding"), got.headers.get("grpc-accept-encoding", "gzip"))
    assert "s3cret" not in caplog.text
    assert not any("s3cret" in path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*.*"))


@given(st.lists(st.integers(1, 4_000), min_size=1, max_size=30), st.integers(100, 2_000))
def test_no_more_leaves_in_any_time_than_the_rate_and_a_second_of_it(sizes: list[int], rate: int) -> None:
    clock = Clock()
    pace, left = Pace(rate, clock), []
    for size in sizes:
        while (pause_s := pace.wait_s()) > 0:
            clock.wait(pause_s)
        pace.spend(size)
        left.append((clock.now_s, size))
    for first, (since_s, _) in enumerate(left):
        for last, (until_s, _) in enumerate(left[first:], first):
            but_the_last = sum(size for _, size in left[first:last])
            assert but_the_last <= rate * (until_s - since_s + 1) + 1e-5 * rate * len(sizes)


def test_a_stop_while_it_waits_for_its_turn_leaves_a_request_unsent(receiver: Receiver, tmp_path: Path) -> None:
    for sent in sending(receiver.url, tmp_path, rate=10):
        sent.clock.most = 1
        assert sent.delivery.deliver(spans())
        assert not sent.delivery.deliver(spans())
        assert receiver.num_asked == 1
