"""Probe, collector and forwarder as real processes, killed in the middle: nothing is lost, nothing is doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from live_system import collecting, free_port

from insitu.segments.layout import list_segments
from insitu_collector.store import open_store

pytestmark = pytest.mark.timeout(300)

PROBE = """
import sys, threading, torch
from torch import nn
import insitu

net, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(16, 64)
rule = insitu.Rule(sites="?*", take="rows", requests="all")
session = insitu.attach(net, to=sys.argv[1], spool=sys.argv[2], rules=[rule], max_rows=16)
with torch.no_grad():
    for number in range(int(sys.argv[3])):
        net(x)
        if number % 100 == 99:
            assert session.flush(30).pending == 0
print(session.source.epoch, sum(session.stats().durable.values()), flush=True)
if sys.argv[4] == "hang":
    with torch.no_grad():
        while True:
            net(x)
            threading.Event().wait(0.01)  # so much traffic, and no more
report = session.close(30)
assert report.pending == report.dropped == 0, report
"""


def forward(spool: Path, port: int) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "insitu", "forward", str(spool), "--to", f"grpc://127.0.0.1:{port}", "--remove"]
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def rows(store: Path, epoch: int) -> dict[str, list[int]]:
    """Return by table the row numbers of a process that a store has."""
    found: dict[str, list[int]] = {}
    opened = open_store(store)
    for name in opened.tables():
        table = opened.table(name).select(["epoch", "row_seq"])
        pairs = zip(table["epoch"].to_pylist(), table["row_seq"].to_pylist(), strict=True)
        if mine := sorted(seq for of, seq in pairs if of == epoch):
            found[name] = mine
    return found


def probe(folder: Path, port: int, num_steps: int, how: str) -> subprocess.Popen[str]:
    script = folder / "probe.py"
    script.write_text(PROBE)
    arguments = [f"grpc://127.0.0.1:{port}", str(folder / "spool"), str(num_steps), how]
    return subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("num_steps", "num_kills"), [(500, 2), pytest.param(1500, 4, marks=pytest.mark.matrix)])
def test_a_forwarder_killed_again_and_again_and_its_collector_too(
    num_steps: int, num_kills: int, tmp_path: Path
) -> None:
    port, store, spool = free_port(), tmp_path / "store", tmp_path / "spool"
    running = probe(tmp_path, port, num_steps, "close")
    said, _ = running.communicate(timeout=200)
    assert running.returncode == 0
    epoch = int(said.split()[0])
    wanted = rows(spool, epoch)
    assert wanted["captures"] == list(range(len(wanted["captures"])))
    assert len(list_segments(spool, "sealed")) > 5
    num_killed = 0
    for moment in range(num_kills):
        with collecting(store, port) as collect:
            arguments = ["-m", "insitu", "forward", str(spool), "--to", f"grpc://127.0.0.1:{port}", "--remove"]
            forwarding = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE)
            before = sum(map(len, rows(store, epoch).values()))
            pause = threading.Event()
            while forwarding.poll() is None and sum(map(len, rows(store, epoch).values())) <= before:
                pause.wait(0.01)
            if forwarding.poll() is None:
                os.kill(forwarding.pid, signal.SIGKILL)
                num_killed += 1
            forwarding.communicate()
            if moment % 2:
                os.kill(collect.process.pid, signal.SIGKILL)
                collect.process.wait()
    assert num_killed > 0, "none was killed in the middle"
    with collecting(store, port):
        done = forward(spool, port)
        assert done.returncode == 0, done.stderr
        again = forward(spool, port)
        assert again.returncode == 0, again.stderr
        assert "has all of it already" in again.stdout
    assert rows(store, epoch) == wanted
    assert list_segments(spool, "sealed") == []


def test_what_a_probe_killed_without_a_collector_had_flushed_is_forwarded(tmp_path: Path) -> None:
    port, store, spool = free_port(), tmp_path / "store", tmp_path / "spool"
    running = probe(tmp_path, port, 300, "hang")
    assert running.stdout is not None
    epoch, num_durable = map(int, running.stdout.readline().split())
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    with collecting(store, port):
        done = forward(spool, port)
        assert done.returncode in (0, 5), done.stderr  # 5: a batch was torn by the kill, and is told
    found = rows(store, epoch)
    assert sum(map(len, found.values())) >= num_durable
    assert set(range(300)) <= set(found["steps"])
    assert all(len(numbers) == len(set(numbers)) for numbers in found.values())


def test_a_probe_whose_collector_comes_back_empties_its_spool_by_itself(tmp_path: Path) -> None:
    port, store, spool = free_port(), tmp_path / "store", tmp_path / "spool"
    running = probe(tmp_path, port, 300, "hang")
    assert running.stdout is not None
    epoch = int(running.stdout.readline().split()[0])
    pause = threading.Event()
    with collecting(store, port):
        for _ in range(600):
            if not list_segments(spool, "sealed") and not list_segments(spool, "open"):
                break
            pause.wait(0.1)
        else:
            raise AssertionError(f"it stays in the spool: {list_segments(spool, 'sealed')}")
        running.terminate()  # nobody handles it: what is not durable yet is lost, no more
        running.communicate()
    found = rows(store, epoch)
    assert set(range(300)) <= set(found["steps"])
    for numbers in found.values():
        assert numbers == list(range(len(numbers))), "none is missing between, none is there twice"
