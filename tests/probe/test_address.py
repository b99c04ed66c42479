"""Where a collector is: one form of URL with TLS, one without, and a bare HOST:PORT."""

from __future__ import annotations

import pytest

from insitu.wire.address import Address, is_loopback


@pytest.mark.parametrize(
    ("text", "target", "is_secure"),
    [
        ("grpc://127.0.0.1:4317", "127.0.0.1:4317", False),
        ("grpcs://collector.example.com:4317", "collector.example.com:4317", True),
        ("collector:1", "collector:1", False),
        ("GRPCS://there:1", "there:1", True),
        ("grpcs://[::1]:4317/", "[::1]:4317", True),
    ],
)
def test_a_collector_is_a_target_with_or_without_tls(text: str, target: str, is_secure: bool) -> None:
    assert Address.of(text) == (target, is_secure)
    assert str(Address.of(text)) == f"{'grpcs' if is_secure else 'grpc'}://{target}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grpcs://there", "destination grpcs://there has no port; the usual one is grpcs://there:4317"),
        ("there", "destination there has no port; the usual one is there:4317"),
        ("there:", "destination there has no port; the usual one is there:4317"),
        ("[::1]", "destination [::1] has no port; the usual one is [::1]:4317"),
        ("grpc://h:x", "destination grpc://h:x: the port 'x' is no number; the usual one is 4317"),
        ("h:4\u00b2", "destination h:4\u00b2: the port '4\u00b2' is no number"),
        ("h:" + "9" * 5000, "destination h:9999"),
        ("grpc://h:4317/foo", "destination grpc://h:4317/foo: a collector has no path and no query; write grpc://h:43"),
        ("grpcs://h:4317?x=1", "destination grpcs://h:4317?x=1: a collector has no path and no query; write grpcs://h"),
        ("h:4317/?x=1", "destination h:4317/?x=1: a collector has no path and no query; write h:4317"),
        ("http://there:1", "http://there:1 is no collector; write it like grpc://127.0.0.1:4317"),
    ],
)
def test_what_is_no_collector_is_said_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        Address.of(text)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_what_stays_on_this_host(host: str) -> None:
    assert is_loopback(host)
    assert Address.of(f"[{host}]:1" if host == "::1" else f"{host}:1").is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.com", "127.0.0.1.example.com", ""])
def test_what_others_reach_or_may_answer_for(host: str) -> None:
    assert not is_loopback(host)
