"""`insitu collect` as a process: what it says, how it fails, and that a kill -9 loses nothing it acknowledged."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from access_kit import Rig
from wait_kit import until

from insitu.exporters import Batch, Retry
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.records import schema_of, table_spec
from insitu.segments.shard import list_segments
from insitu_collector.otlp.ports import DEFAULT_PORT
from insitu_collector.store import open_store

STREAM = table_spec("events").stream
INSITU = [sys.executable, "-c", "from insitu.cli import main; main()"]


def events(seq: int) -> Batch:
    rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": seq, "t_ns": 0, "kind": "incident", "text": "x" * 2000}]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


class Collector:
    """A running `insitu collect`, ready when made."""

    def __init__(self, store: Path, port: int = 0, *options: str) -> None:
        command = [*INSITU, "collect", "--store", str(store), "--port", str(port), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            match = re.fullmatch(r"collecting on grpcs?://127\.0\.0\.1:(\d+) into (.*)", self.said[-1])
            if match:
                assert match[2] == str(store)
                self.port = int(match[1])
                break
        else:
            raise AssertionError(f"it did not start: {self.said}")
        self._drain = threading.Thread(target=self._read_on)
        self._drain.start()

    def _read_on(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
        self.process.stderr.close()

    def end(self, number: int) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        status = self.process.wait(30)
        self._drain.join()
        return status


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    running = Collector(tmp_path / "store")
    yield running
    running.end(signal.SIGKILL)


def fails(*options: str, status: int = 1, insitu: Sequence[str] = INSITU) -> str:
    """Return the one line that a collect which cannot work says."""
    ran = subprocess.run([*insitu, "collect", *options], capture_output=True, text=True, timeout=60)
    assert ran.returncode == status, ran.stderr
    assert ran.stdout == ""
    lines = ran.stderr.splitlines()
    assert len(lines) == 1, ran.stderr
    return lines[0]


EACH = """
import json, sys
from click.testing import CliRunner
from insitu.cli import insitu

for options in json.load(sys.stdin):
    ran = CliRunner().invoke(insitu, ["collect", *options])
    print(json.dumps([ran.exit_code, ran.stdout, ran.stderr]))
"""


def misused(*commands: Sequence[str]) -> list[str]:
    """Return the one line that each of several says, which are used wrongly, in one process."""
    ran = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps(commands), capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(status, stdout) for status, stdout, _ in found] == [(2, "")] * len(commands), found
    lines = [stderr.splitlines() for _, _, stderr in found]
    assert all(len(said) == 1 for said in lines), lines
    return [said for (said,) in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_seals_the_store_and_ends_with_status_0(collector: Collector, tmp_path: Path, number: int) -> None:
    exporter = CollectorExporter(f"127.0.0.1:{collector.port}", Source(epoch=7))
    exporter.export(events(0))
    assert exporter.flush(30)
    assert collector.end(number) == 0
    exporter.close(1)
    assert list_segments(tmp_path / "store", "open") == []
    assert open_store(tmp_path / "store").table("events").num_rows == 1
    assert [path.name for path in (tmp_path / "store/v1").iterdir() if path.is_file()] == ["id"]


def test_a_second_collector_on_a_store_is_refused_in_one_line(collector: Collector, tmp_path: Path) -> None:
    line = fails("--store", str(tmp_path / "store"), "--port", "0")
    assert f"another collector (process {collector.process.pid}) already writes {tmp_path / 'store'}" in line
    assert "use another --store" in line


def test_a_port_in_use_is_said_in_one_line_and_the_store_untouched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = fails("--store", str(tmp_path / "store"), "--port", str(port))
    assert f"cannot listen on 127.0.0.1:{port}: address already in use; choose another with --port" in line
    assert not (tmp_path / "store").exists()


def test_a_port_in_use_is_all_that_is_said_where_there_is_more_to_say(tmp_path: Path) -> None:
    """That the usual port of OTLP is not free either, and where the pages are."""
    with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.ExitStack() as usual:
        with contextlib.suppress(OSError):  # it is another's already
            usual.enter_context(socket.create_server(("127.0.0.1", DEFAULT_PORT)))
        port = taken.getsockname()[1]
        line = fails("--store", str(tmp_path / "store"), "--port", str(port), "--metrics-port", "0")
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in line


def test_a_port_that_is_taken_after_it_was_looked_at_is_said_in_one_line(tmp_path: Path) -> None:
    looks_free = [*INSITU[:2], f"import socket; socket.socket.bind = lambda *_: None; {INSITU[2]}"]  # to Python alone
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = ("--store", str(tmp_path / "store"), "--port", str(port), "--otlp-http-port", "off")
        line = fails(*given, insitu=looks_free)
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in line
    assert not (tmp_path / "store").exists()


def test_a_store_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    line = fails("--store", str(tmp_path / "file/store"), "--port", "0")
    assert f"store {tmp_path}/file/store cannot be written: not a directory; give a directory" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"), [("size=64k", "is full"), ("size=8m,ro", "cannot be written: read-only file system")]
)
def test_a_full_or_read_only_disk_is_said_in_one_line(tmp_path: Path, options: str, words: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        assert words in fails("--store", str(disk / "store"), "--port", "0")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_it_says_what_it_keeps(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "store", 0, "--keep-bytes", "500MiB", "--keep-for", "none")
    assert collector.end(signal.SIGTERM) == 0
    assert collector.said[0] == "keeps 500 MiB, oldest first; --keep-bytes and --keep-for change it"


def test_nonsense_to_keep_is_said_in_one_line(tmp_path: Path) -> None:
    line = fails("--store", str(tmp_path / "store"), "--port", "0", "--keep-bytes", "lots", status=2)
    assert line == "Error: keep_bytes: 'lots' is no size; write it like 2GiB, 500MB or none"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("num_kills", [3, pytest.param(6, marks=pytest.mark.matrix)])
def test_a_killed_collector_loses_nothing_it_acknowledged(num_kills: int, tmp_path: Path) -> None:
    """Kill it at random moments under traffic, start it again on the same store, and count."""
    chance = random.Random(20)
    store = tmp_path / "store"
    collector = Collector(store)
    port = collector.port
    exporter = CollectorExporter(f"127.0.0.1:{port}", Source(epoch=7))
    seq = 0
    for _ in range(num_kills):
        target = seq + chance.randrange(20, 300)
        while seq < target:
            try:
                exporter.export(events(seq))
                seq += 1
            except Retry as retry:
                threading.Event().wait(retry.after_s)
        threading.Event().wait(chance.random() * 0.1)  # somewhere in or between two commits
        acknowledged = exporter.durable(STREAM)
        assert collector.end(signal.SIGKILL) == -signal.SIGKILL
        found = open_store(store).table("events").column("row_seq").to_pylist() if (store / "v1").exists() else []
        assert set(range(acknowledged + 1)) <= set(found), "acknowledged as durable, and not there"
        collector = Collector(store, port)
    assert exporter.flush(60), "everything not acknowledged was kept and sent again"
    assert exporter.refused() == []
    exporter.close(5)
    assert collector.end(signal.SIGTERM) == 0
    table = open_store(store).table("events")
    assert sorted(table.column("row_seq").to_pylist()) == list(range(seq)), "each row once"
    assert list_segments(store, "open") == list_segments(store, "quarantine") == []
    assert not any(os.scandir(store / "v1/open/events"))


def judge_of(collector: Collector, *, not_pid: int = 0) -> psutil.Process:
    """Return the collector's judge, once there is one (other than `not_pid`), at its low priority."""
    while True:
        assert collector.process.poll() is None, collector.said
        for child in psutil.Process(collector.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.pid != not_pid and "judge" in child.cmdline() and child.nice() >= 10:
                    return child
        threading.Event().wait(0.02)


def test_the_judge_runs_beside_the_collector_comes_back_when_it_dies_and_ends_with_it(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "store", 0, "--judge")
    first = judge_of(collector)
    to = ["--to", f"grpc://127.0.0.1:{collector.port}"]
    assert first.cmdline()[-5:] == ["judge", str(tmp_path / "store"), "--wait", *to]
    first.kill()
    second = judge_of(collector, not_pid=first.pid)
    assert collector.end(signal.SIGTERM) == 0
    assert not second.is_running()
    assert any("the judge ended with status -9" in line for line in collector.said)


def test_a_killed_collector_leaves_no_judge_behind(tmp_path: Path) -> None:
    collector = Collector(tmp_path / "store", 0, "--judge")
    judge = judge_of(collector)
    wait_until_running(judge)
    collector.end(signal.SIGKILL)
    psutil.wait_procs([judge], timeout=30)
    assert not judge.is_running() or judge.status() == psutil.STATUS_ZOMBIE


def wait_until_running(judge: psutil.Process) -> None:
    """Wait until the judge has begun to follow the store: from then on it ends with its collector."""
    while judge.is_running() and not any("pyarrow" in mapped.path for mapped in judge.memory_maps()):
        threading.Event().wait(0.02)


def test_it_does_not_listen_for_others_without_tls_and_tokens(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.entry("somebody")
    tls, tokens = ("--tls-cert", str(rig.cert), "--tls-key", str(rig.key)), ("--tokens", str(rig.tokens))
    tried: list[tuple[str, Sequence[str]]] = [("0.0.0.0", more) for more in ((), tls, tokens)]
    tried += [(host, ()) for host in ("::", "10.0.0.7", "collector.example.com")]
    given = ("--store", str(tmp_path / "store"), "--port", "0", "--host")
    for (host, _), said in zip(tried, misused(*((*given, host, *more) for host, more in tried)), strict=True):
        what = "give --tls-cert, --tls-key and --tokens (or --tls-client-ca), or, "
        assert said.startswith(f"Error: on {host} others can reach it: {what}")
    assert not (tmp_path / "store").exists()


def test_insecure_lets_it_and_is_said(tmp_path: Path) -> None:
    command = [*INSITU, "collect", "--store", str(tmp_path), "--port", "0", "--host", "0.0.0.0", "--insecure"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert re.fullmatch(
            rf"anyone who reaches 0\.0\.0\.0:\d+ can write to {tmp_path} \(--insecure\)\n", process.stderr.readline()
        )
        process.terminate()


def test_files_that_let_nobody_in_are_said_in_one_line(tmp_path: Path) -> None:
    rig, given = Rig(tmp_path), ("--store", str(tmp_path / "store"), "--port", "0")
    rig.entry("somebody")
    rig.tokens.chmod(0o644)
    tls = (*given, "--tls-cert", str(rig.cert))
    no_key, no_private_key, open_to_all = misused(
        tls, (*tls, "--tls-key", str(rig.ca_file)), (*given, "--tokens", str(rig.tokens))
    )
    assert no_key == "Error: TLS needs a certificate and its key: give --tls-key, too"
    assert no_private_key.startswith(f"Error: {rig.ca_file} has no private key in PEM; give a file that has one")
    assert open_to_all.endswith(f"has mode 0644, so others may use it; chmod 600 {rig.tokens}")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("with_tls", [True, False])
def test_the_judge_of_a_guarded_collector_is_let_in(tmp_path: Path, with_tls: bool) -> None:
    """By a token that is in no file and on no command line, whether or not it can be reached without TLS."""
    rig, store = Rig(tmp_path), tmp_path / "store"
    credentials = rig.with_token(rig.entry("rank-0"))
    tls = ("--tls-cert", str(rig.cert), "--tls-key", str(rig.key)) if with_tls else ()
    collector = Collector(store, 0, "--judge", "--tokens", str(rig.tokens), *tls)
    assert not any("insitu_" in word for word in judge_of(collector).cmdline())
    target = f"{'grpcs' if with_tls else 'grpc'}://127.0.0.1:{collector.port}"
    exporter = CollectorExporter(target, Source(epoch=7), credentials=credentials)
    exporter.export(events(0))
    assert exporter.flush(30)
    until(lambda: open_store(store).table("health").num_rows or None, "the judge's own rows")
    assert collector.end(signal.SIGTERM) == 0
    exporter.close(1)
    assert not [line for line in collector.said if "refuses" in line]


def test_a_collector_takes_its_files_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path)
    credentials = rig.with_token(rig.entry("rank-0"))
    for name, path in (("TLS_CERT", rig.cert), ("TLS_KEY", rig.key), ("TOKENS", rig.tokens)):
        monkeypatch.setenv(f"INSITU_{name}", str(path))
    collector = Collector(tmp_path / "store")
    exporter = CollectorExporter(f"grpcs://127.0.0.1:{collector.port}", Source(epoch=7), credentials=credentials)
    exporter.export(events(0))
    assert exporter.flush(30)
    assert collector.end(signal.SIGTERM) == 0
    exporter.close(1)
