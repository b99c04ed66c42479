"""Why a receiver was not reached: one line that names its address and the remedy, in no library's words."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner
from feed_kit import Writer, interval, source
from target_kit import TARGETS, tls_target
from test_otlp_payloads import request_of

from insitu.cli import ExitCode, insitu
from insitu_collector.subscriber import replay_command, unreached
from insitu_collector.subscriber.answers import Answer, Outcome
from insitu_collector.subscriber.ends import open_end
from insitu_collector.subscriber.payloads import payload_of
from insitu_collector.subscriber.target import parse_target

SCHEMES = ("http", "grpc")


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(tmp_path: Path, ca: trustme.CA) -> str:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


@contextmanager
def nobody() -> Iterator[str]:
    """Give an address that is taken, and at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def hanging_up() -> Iterator[str]:
    """Give an address at which each connection ends at once."""

    def serve() -> None:
        while True:
            try:
                listener.accept()[0].close()
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def sent(url: str, ca_file: str = "") -> Answer:
    environment = {"OTEL_EXPORTER_OTLP_CERTIFICATE": ca_file, "OTEL_EXPORTER_OTLP_TIMEOUT": "20"}
    with closing(open_end(parse_target(url, environment))) as end:
        return end.send(payload_of("traces", request_of("traces", [[1]]).SerializeToString()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_there_is_told_with_the_remedy(scheme: str) -> None:
    with nobody() as place:
        answer = sent(f"{scheme}://{place}")
    assert (answer.outcome, answer.text) == (Outcome.AGAIN, unreached.NOBODY)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_that_hangs_up_is_told_with_the_remedy(scheme: str) -> None:
    with hanging_up() as place:
        answer = sent(f"{scheme}://{place}")
        assert (answer.outcome, answer.text) == (Outcome.AGAIN, unreached.HUNG_UP)
        answer = sent(f"{scheme}s://{place}")
        assert answer.text in (unreached.BROKE_OFF, unreached.HUNG_UP)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_certificate_that_is_not_believed_is_told_with_the_remedy(scheme: str, ca: trustme.CA, ca_file: str) -> None:
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    shown = {
        unreached.UNKNOWN: trustme.CA().issue_cert("127.0.0.1"),
        unreached.EXPIRED: ca.issue_cert("127.0.0.1", not_after=long_ago),
        unreached.OTHER_NAME: ca.issue_cert("elsewhere.example"),
    }
    for why, leaf in shown.items():
        with tls_target(scheme, ca, leaf=leaf) as receiver:
            answer = sent(receiver.url, ca_file)
        assert (answer.outcome, answer.reason, answer.text) == (Outcome.HELD, "TLS", why)
    with tls_target(scheme, ca, asks=True) as receiver:
        answer = sent(receiver.url, ca_file)
    assert answer.text in (unreached.BROKE_OFF, unreached.HUNG_UP), "TLS 1.3 tells it after the handshake"
    with TARGETS[scheme]() as receiver:
        answer = sent(receiver.url.replace("://", "s://"), ca_file)
    assert (answer.outcome, answer.text) == (Outcome.HELD, unreached.NO_TLS)


def test_a_host_that_is_none_is_told_with_the_remedy() -> None:
    assert sent("http://no-host.invalid:4318").text == unreached.NO_HOST
    for said in ("DNS resolution failed for x", "errors resolving x:1: [address lookup failed: Domain name not found]"):
        assert unreached.of_details(said) == unreached.NO_HOST


def test_a_proxy_that_is_away_is_not_taken_for_the_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    with nobody() as proxy, TARGETS["http"]() as receiver:
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        answer = sent(receiver.url.replace("127.0.0.1", "receiver.invalid"))
    assert (answer.outcome, answer.text) == (Outcome.AGAIN, unreached.OF_PROXY)


def test_what_a_receiver_says_itself_is_told_as_it_is() -> None:
    said = "busy: Connection refused behind it"
    assert unreached.of_details(said) == said
    assert unreached.of_error(OSError("no bundle at /x\n")) == "no bundle at /x"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_replay_to_nobody_says_one_line_and_ends(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replay_command, "GIVE_UP_S", 0.0)
    with closing(Writer(tmp_path)) as writer:
        rank = source(1)
        writer.rows(rank, "sources", rank.row())
        writer.rows(rank, "intervals", interval(0))
    with nobody() as place, caplog.at_level(logging.WARNING):
        to = f"{scheme}://{place}"
        result = CliRunner().invoke(insitu, ["store", "replay", str(tmp_path), "--to", to])
    assert result.exit_code == ExitCode.UNREACHABLE
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"insitu store replay: {to} takes nothing (") and line.endswith(f": {unreached.NOBODY})")
