"""Webhooks, over real sockets: servers that take, refuse, redirect, hang, drip and are not there."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from alert_kit import alert, serving

from insitu_collector.notify.delivery import Unsent
from insitu_collector.notify.webhooks import Webhook, name_of


def test_an_alert_is_posted_as_json() -> None:
    with serving() as server:
        webhook = Webhook(server.url)
        webhook.send(alert())
        found = server.got.get(timeout=10)
        assert {name: found[name] for name in ("schema", "incident", "state")} == {
            "schema": "insitu.alert/1",
            "incident": "run-stuck-r1-1",
            "state": "open",
        }
        assert found["verdict"]["text"] == "rank 1 (stage 1) is stuck."
        assert server.paths == ["/hook?token=secret"]
        assert server.headers[0]["Content-Type"] == "application/json"
        assert server.headers[0]["User-Agent"].startswith("insitu/")


@pytest.mark.parametrize(
    ("status", "again"),
    [(500, True), (503, True), (429, True), (408, True), (400, False), (404, False), (410, False), (302, False)],
)
def test_a_refusal_says_whether_to_try_again(status: int, again: bool) -> None:
    with serving(status) as server:
        with pytest.raises(Unsent, match=f"HTTP {status}") as refused:
            Webhook(server.url).send(alert())
        assert refused.value.again is again
        assert len(server.paths) == 1  # a redirect is not followed


@pytest.mark.parametrize("how", ["hang", "drip"])
def test_a_server_that_takes_its_time_is_left(how: str) -> None:
    with serving(how) as server:
        began = time.monotonic()
        with pytest.raises(Unsent, match="no answer in time") as refused:
            Webhook(server.url, attempt_s=0.3).send(alert())
        assert refused.value.again
        assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["garbage", "reset"])
def test_a_server_that_speaks_no_http_is_tried_again(how: str) -> None:
    with serving(how) as server, pytest.raises(Unsent) as refused:
        Webhook(server.url).send(alert())
    assert refused.value.again
    assert str(refused.value)


def test_a_server_that_is_not_there_is_tried_again() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(Unsent, match=r"(?i)refused") as refused:
            Webhook(f"http://127.0.0.1:{held.getsockname()[1]}").send(alert())
    assert refused.value.again


def test_closing_ends_an_attempt() -> None:
    with serving("hang") as server:
        webhook = Webhook(server.url, attempt_s=60)
        failures: list[Unsent] = []

        def send() -> None:
            try:
                webhook.send(alert())
            except Unsent as error:
                failures.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        assert server.hanging.wait(10)
        webhook.close()
        thread.join(10)
        assert not thread.is_alive()
        assert len(failures) == 1
        with pytest.raises(Unsent, match="the judge ends"):
            webhook.send(alert())


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://there/x", "no http:// or https:// URL"),
        ("file:///etc/passwd", "no http:// or https:// URL"),
        ("there", "no http:// or https:// URL"),
        ("http:///path", "no http:// or https:// URL"),
        ("http://me:secret@there/", "no user or password"),
        ("http://there:port/", "could not be cast"),
        ("http://there/a b", "percent-encoded"),
        ("http://there/a\r\nHost: other", "percent-encoded"),
    ],
)
def test_other_addresses_are_refused_without_telling_secrets(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        Webhook(url)
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_hides_what_is_secret_and_tells_urls_apart() -> None:
    one, other = name_of("https://hooks.example.com/T/secret-1"), name_of("https://hooks.example.com/T/secret-2")
    assert one != other
    assert one.startswith("https://hooks.example.com (")
    assert "secret" not in one
