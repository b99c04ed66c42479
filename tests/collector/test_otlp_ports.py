"""Where OTLP/HTTP is listened for: a port that was said is had or refused, the usual one is had if it is free."""

from __future__ import annotations

import errno
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from otlp_in_kit import port_of, spans

from insitu_collector.otlp import ports
from insitu_collector.otlp.ports import http_listener

COLLECT = [sys.executable, "-m", "insitu", "collect"]


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield port_of(other)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as other:
        return port_of(other)


def test_the_usual_port_is_had_where_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ports.DEFAULT_PORT == 4318
    monkeypatch.setattr(ports, "DEFAULT_PORT", free_port())
    listener, why_not = http_listener(None, "127.0.0.1", 4317)
    assert listener is not None and why_not == ""
    with listener:
        assert port_of(listener) == ports.DEFAULT_PORT


def test_without_the_usual_port_it_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(ports, "DEFAULT_PORT", taken)
    listener, why_not = http_listener(None, "127.0.0.1", 4317)
    assert listener is None
    assert why_not == (
        f"no OTLP over HTTP, 127.0.0.1:{taken}: address already in use; choose another port with --otlp-http-port"
    )


@pytest.mark.parametrize(("said", "own"), [("off", 4317), ("off", 0), (None, 0)])
def test_there_is_none_where_that_is_said_or_the_collectors_own_port_is_any(said: str | None, own: int) -> None:
    assert http_listener(said, "127.0.0.1", own) == (None, "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_any_port_is_had_on_addresses_of_either_family(host: str) -> None:
    if host == "[::1]" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    listener, _ = http_listener("0", host, 0)
    assert listener is not None
    with listener:
        assert port_of(listener) > 0


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::1", 9)) != errno.EADDRNOTAVAIL


def test_a_host_that_is_none_is_said() -> None:
    with pytest.raises(OSError) as caught:
        http_listener("0", "no.such.host.invalid", 0)
    assert caught.value.filename == "no.such.host.invalid:0" and caught.value.strerror


def test_a_port_that_was_said_and_is_taken_is_refused_in_one_line_and_the_store_untouched(
    tmp_path: Path, taken: int
) -> None:
    command = [*COLLECT, "--store", str(tmp_path / "store"), "--port", "0", "--otlp-http-port", str(taken)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        f"Error: cannot listen on 127.0.0.1:{taken}: address already in use; "
        "choose another with --otlp-http-port (0: any; off: none)\n"
    )
    assert not (tmp_path / "store").exists()


def test_nonsense_for_a_port_is_said(tmp_path: Path) -> None:
    command = [*COLLECT, "--store", str(tmp_path / "store"), "--otlp-http-port", "65536"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "it is a port, 0 for a free one, or off" in ran.stderr


def test_collect_says_where_it_listens_for_what_and_gives_its_account(tmp_path: Path) -> None:
    command = [*COLLECT, "--store", str(tmp_path / "store"), "--port", "0", "--otlp-http-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stdout is not None
        lines = iter(process.stderr.readline, "")
        found = next(
            match for line in lines if (match := re.match(r"takes OTLP .* and on (http://\S+) \(HTTP\)", line))
        )
        headers = {"Content-Type": "application/x-protobuf"}
        answer = httpx.post(f"{found[1]}/v1/traces", content=spans(4).SerializeToString(), headers=headers)
        assert answer.status_code == 200
        process.terminate()
        said = json.loads(process.stdout.read())
        process.stderr.read()
    assert process.returncode == 0
    assert said["otlp"] == {"stored": {"spans": 4}, "rejected": {}, "refused_requests": {}}
    (source,) = said["sources"]
    assert source["produced"]["spans"] == source["durable"]["spans"] == 4
