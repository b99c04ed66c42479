"""The whole way: a store is judged by a process, and who asked hears of each incident once, whoever starts again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alert_kit import of_just_now, serving
from click.testing import CliRunner
from wait_kit import until

from insitu.config import ConfigError, load
from insitu_collector.notify.receivers import receivers_of
from insitu_collector.service.command import collect
from insitu_collector.simulate import Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store

SLOW = Scenario(seed=3, seconds=9.0, faults=(Fault("slow", 4.0, 1, ms=12.0),))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A run of just now, so that what opened in it is worth telling."""
    write_store(of_just_now(simulate(SLOW)), str(tmp_path / "store"))
    return tmp_path / "store"


@contextmanager
def judging(store: Path, *args: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "insitu", "judge", str(store), *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | variables)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0


def events(store: Path, kind: str) -> list[str]:
    return [row["text"] for row in open_store(store).table("events").to_pylist() if row["kind"] == kind]


def test_each_incident_is_told_once_also_by_a_judge_that_starts_again(store: Path) -> None:
    with serving() as server:
        with judging(store, "--webhook", server.url):
            document = server.got.get(timeout=40)
            until(lambda: len(events(store, "alert_sent")) == 1)
        assert document["verdict"]["kind"] == "stage_limits"
        assert document["state"] == "open"
        (opened,) = events(store, "incident_opened")
        assert opened == f"{document['incident']}: {document['verdict']['text']}"
        ended = subprocess.run(
            [sys.executable, "-m", "insitu", "judge", str(store), "--once", "--webhook", server.url],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (ended.stderr, server.got.qsize(), len(server.paths)) == ("", 0, 1)
        assert len(events(store, "incident_opened")) == 1
        assert "secret" not in json.dumps(open_store(store).table("events").to_pylist())


def test_what_nobody_took_is_sent_by_the_next_judge(store: Path) -> None:
    with serving(*["reset"] * 1000) as down, judging(store, INSITU_WEBHOOKS=down.url) as process:
        assert down.hanging.wait(40)
        assert process.stderr is not None
        lines = [process.stderr.readline(), process.stderr.readline()]
    assert lines[0].startswith("judging ")
    assert "does not take alerts" in lines[1]
    assert "secret" not in lines[1]
    assert events(store, "alert_sent") == []
    with serving() as server, judging(store, "--webhook", server.url):
        assert server.got.get(timeout=40)["verdict"]["kind"] == "stage_limits"


def test_a_run_of_long_ago_sets_off_nothing(tmp_path: Path) -> None:
    write_store(simulate(SLOW), str(tmp_path / "store"))
    with serving() as server:
        command = [sys.executable, "-m", "insitu", "judge", str(tmp_path / "store"), "--once", "--webhook", server.url]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        assert server.paths == []
    assert len(events(tmp_path / "store", "incident_opened")) == 1
    assert events(tmp_path / "store", "alert_given_up") == []


def test_a_collector_hands_addresses_to_its_judge_where_nobody_sees_them(store: Path, tmp_path: Path) -> None:
    with serving() as server:
        collector = subprocess.Popen(
            [sys.executable, "-m", "insitu", "collect", "--store", str(store), "--port", "0", "--judge",
             "--webhook", server.url], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert server.got.get(timeout=40)["verdict"]["kind"] == "stage_limits"
            children = Path(f"/proc/{collector.pid}/task/{collector.pid}/children").read_text().split()
            arguments = [Path(f"/proc/{child}/cmdline").read_text() for child in children]
            assert any("judge" in line for line in arguments)
            assert not any("secret" in line for line in arguments)
        finally:
            collector.terminate()
            collector.wait(30)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--judge", "--webhook", "ftp://there"], "'ftp://there' is no http:// or https:// URL"),
        (["--judge", "--otlp-logs", "there:4317"], "is no http:// or https:// URL"),
        (["--webhook", "http://there"], "add --judge"),
        (["--judge-metrics-port", "0"], "add --judge"),
    ],
)
def test_an_option_that_cannot_work_is_said_at_once(args: list[str], why: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(collect, ["--store", str(tmp_path / "store"), "--port", "0", *args])
    assert result.exit_code == 2
    assert why in result.output
    assert not (tmp_path / "store").exists()


def test_a_variable_meant_for_others_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert receivers_of(load(tmp_path, {"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "there:4317"})) == []
    assert "incidents are not sent as OTLP logs: the OTLP endpoint" in caplog.text
    (tmp_path / "insitu.toml").write_text('otlp_logs = "there:4317"')
    with pytest.raises(ConfigError, match="the OTLP endpoint"):
        receivers_of(load(tmp_path, {}))


def test_settings_name_receivers_once_each(tmp_path: Path) -> None:
    (tmp_path / "insitu.toml").write_text('webhooks = ["http://a/1", "http://a/2", "http://a/1"]')
    found = receivers_of(load(tmp_path, {}))
    assert len({receiver.target for receiver in found}) == len(found) == 2
    with pytest.raises(ConfigError, match="is no http"):
        receivers_of(load(tmp_path, {"INSITU_WEBHOOKS": "gopher://a"}))
