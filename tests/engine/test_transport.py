"""Two ranks of the engine as processes: what the probe says of sends and receives is what torch itself saw.

Its profiler sees both, with peer, tag and shape. Its flight recorder, over gloo, writes down collectives alone (torch
2.13), and when they are asked for, not when they end: so it is the witness where a broadcast carries what is sent, and
of collectives (e2e/test_tensor_parallel.py).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from insitu.vocabulary import IntervalClass
from insitu_collector.store import open_store
from insitu_engine.messages import Frames, Ready, RowPlan, Sampled, Sampling, StepPlan, Stop, Traffic, frame, to_driver

HIDDEN_SIZE: Final = 64
SIZES: Final = (3, 1, 9, 1, 1, 30, 1, 2)
"""Rows of each step."""
LATE_S: Final = 0.02
"""So much later than the second rank the first one gets each plan: a wait that both accounts must show."""
ERROR_NS: Final = 1_000_000
"""How far the two accounts may be apart: each reads CLOCK_MONOTONIC or the TSC and adds a Unix anchor of its own, and a
clock that NTP slews by the most it may, 500 ppm, is off by this after two seconds."""


@dataclass(frozen=True)
class Seen:
    """One operation as torch saw it; Unix ns."""

    name: str
    t0_ns: int
    t1_ns: int
    peer: int
    tag: int
    shape: list[int]


class Ranks:
    """Two ranks, each a process under torch's profiler, and the driver's ends of their sockets."""

    def __init__(self, checkpoint: Path, folder: Path, boots: tuple[str, ...], *, is_recorded: bool) -> None:
        """is_recorded: by torch's flight recorder, too."""
        self.folder = folder
        variables = os.environ | ({"TORCH_FR_BUFFER_SIZE": "1000"} if is_recorded else {})
        self._ours, self._processes = [], []
        self._frames = [Frames(to_driver) for _ in boots]
        script = str(Path(__file__).with_name("profiled_rank.py"))
        for rank, boot in enumerate(boots):
            ours, theirs = socket.socketpair()
            args = [
                str(rank),
                str(len(boots)),
                str(theirs.fileno()),
                str(checkpoint),
                str(folder),
                *filter(None, [boot]),
            ]
            command = [sys.executable, script, *args]
            self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=variables))
            theirs.close()
            self._ours.append(ours)

    def send(self, rank: int, *messages: Any) -> None:
        for message in messages:
            self._ours[rank].sendall(frame(message))

    def run(self, sizes: tuple[int, ...]) -> None:
        """Run one request's steps one after the other, then let the ranks go and wait for them."""
        for rank in range(2):
            assert isinstance(self._answer(rank), Ready)
            self.send(rank, Traffic(0))
        position = 0
        for step_id, count in enumerate(sizes):
            row = RowPlan("r", 0, count, position, "prefill", 0, False, [1, 2, 3, 4], [5] * count, Sampling())
            plan = StepPlan(step_id, 0, "prefill", count, 1, [row], [])
            self.send(1, plan)
            time.sleep(LATE_S)  # part of what is measured, not a wait for anything
            self.send(0, plan)
            answer = self._answer(1)
            assert isinstance(answer, Sampled) and answer.step_id == step_id
            position += count
        for rank in range(2):
            self.send(rank, Stop())
        for process in self._processes:
            assert process.wait(60) == 0

    def _answer(self, rank: int) -> Any:
        """Return the rank's next message: it says no more than what it was asked."""
        found: list[Any] = []
        while not found:
            data = self._ours[rank].recv(4096)
            assert data, f"rank {rank} is gone"
            found = list(self._frames[rank].feed(data))
        [message] = found
        return message

    def close(self) -> None:
        for end in self._ours:
            end.close()
        for process in self._processes:
            process.kill()
            process.wait()

    def torchs(self, rank: int, name: str) -> list[Seen]:
        """Return what torch saw of a rank's operations of one name, in order of their begin."""
        told = json.loads((self.folder / f"torch-{rank}.json").read_text())
        found = []
        for event in sorted(told["events"], key=lambda each: float(each["ts"])):
            if event["name"] == name:
                t0_ns = told["base_unix_ns"] + round(event["ts"] * 1e3)
                inputs = event["args"]["Concrete Inputs"]
                peer, tag = (int(inputs[2]), int(inputs[3])) if len(inputs) > 3 else (-1, -1)
                dims = event["args"]["Input Dims"][0]
                shape = dims[0] if dims and isinstance(dims[0], list) else dims
                found.append(Seen(name, t0_ns, t0_ns + round(event["dur"] * 1e3), peer, tag, shape))
        return found

    def recorded(self, rank: int) -> list[tuple[int, list[int]]]:
        """Return when each broadcast of a rank was asked for (Unix ns), and its shape, in order."""
        told = json.loads((self.folder / f"recorded-{rank}.json").read_text())["entries"]
        found = [entry for entry in told if entry["profiling_name"] == "gloo:broadcast"]
        return sorted((entry["time_created_ns"], entry["input_sizes"][0]) for entry in found)

    def ours(self, rank: int, *classes: IntervalClass) -> dict[int, dict[str, int]]:
        """Return step -> its intervals of these classes with the other rank, from first begin to last end; Unix ns."""
        store = open_store(self.folder / "store")
        [source] = [row for row in store.table("sources").to_pylist() if row["rank"] == rank]
        unix = source["unix_anchor_ns"] - source["mono_anchor_ns"]
        found: dict[int, dict[str, int]] = {}
        for row in store.table("intervals").to_pylist():
            if row["epoch"] == source["epoch"] and row["cls"] in classes and row["peer"] == 1 - rank:
                step = found.setdefault(row["step_id"], {"t0": 2**63, "t1": 0, "bytes": 0})
                step["t0"] = min(step["t0"], row["t0_ns"] + unix)
                step["t1"] = max(step["t1"], row["t1_ns"] + unix)
                step["bytes"] += row["bytes"] or 0
        return dict(sorted(found.items(), key=lambda each: each[1]["t0"]))


MakeRanks = Callable[..., Ranks]


@pytest.fixture
def make_ranks(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[MakeRanks]:
    made: list[Ranks] = []

    def make(*boots: str, is_recorded: bool = False) -> Ranks:
        made.append(Ranks(make_checkpoint(), tmp_path, boots or ("", ""), is_recorded=is_recorded))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


def test_torch_saw_the_sends_and_receives_that_the_probe_recorded(make_ranks: MakeRanks) -> None:
    ranks = make_ranks()
    ranks.run(SIZES)
    steps = list(range(len(SIZES)))
    tags = [tag for step in steps for tag in (2 * step, 2 * step + 1)]
    shapes = [shape for num_rows in SIZES for shape in ([8], [num_rows, HIDDEN_SIZE])]

    sent, got = ranks.ours(0, IntervalClass.SEND_XFER), ranks.ours(1, IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER)
    assert list(sent) == list(got) == steps
    for rank, calls, works in ((0, "c10d::send", "gloo:send"), (1, "c10d::recv_", "gloo:recv")):
        seen = ranks.torchs(rank, calls)
        assert [each.tag for each in seen] == tags, "number and order"
        assert {each.peer for each in seen} == {1 - rank}
        assert [each.shape for each in seen] == shapes
        assert [each.shape for each in ranks.torchs(rank, works)] == shapes

    num_bytes = [num_rows * HIDDEN_SIZE * 4 for num_rows in SIZES]
    assert [step["bytes"] for step in sent.values()] == num_bytes
    assert [step["bytes"] for step in got.values()] == num_bytes
    check_sends(ranks, sent)
    check_receives(ranks, got)


def check_sends(ranks: Ranks, sent: dict[int, dict[str, int]]) -> None:
    calls = ranks.torchs(0, "c10d::send")
    for step, ours in sent.items():
        header, payload = calls[2 * step : 2 * step + 2]
        assert ours["t0"] - ERROR_NS <= header.t0_ns
        assert payload.t1_ns <= ours["t1"] + ERROR_NS
    assert statistics.median(abs(calls[2 * step + 1].t1_ns - ours["t1"]) for step, ours in sent.items()) < ERROR_NS


def check_receives(ranks: Ranks, got: dict[int, dict[str, int]]) -> None:
    posts, works, sends = (
        ranks.torchs(rank, name) for rank, name in ((1, "c10d::recv_"), (1, "gloo:recv"), (0, "c10d::send"))
    )
    transfers = ranks.ours(1, IntervalClass.RECV_XFER)
    assert list(transfers) == list(got)
    ends, waits = [], []
    for step, ours in got.items():
        posted, done = posts[2 * step + 1], works[2 * step + 1]
        assert posted.t1_ns <= ours["t0"] + ERROR_NS, "the wait begins once the receive is posted"
        assert done.t1_ns <= ours["t1"] + ERROR_NS, "and ends when torch has the hidden states"
        ends.append(abs(done.t1_ns - ours["t1"]))
        # The other host's account: the transfer begins when the sender hands the step to torch.
        assert transfers[step]["t0"] <= sends[2 * step].t0_ns + ERROR_NS
        waits.append(abs(sends[2 * step].t0_ns - transfers[step]["t0"]))
        assert transfers[step]["t0"] - ours["t0"] > LATE_S * 1e9 / 2, "what the first rank was late by is a wait"
    assert statistics.median(ends) < ERROR_NS
    assert statistics.median(waits) < ERROR_NS


@pytest.mark.matrix
def test_torchs_flight_recorder_saw_them_when_the_probe_did(make_ranks: MakeRanks) -> None:
    ranks = make_ranks(is_recorded=True)
    ranks.run(SIZES)
    sent, got = ranks.ours(0, IntervalClass.SEND_XFER), ranks.ours(1, IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER)
    assert list(sent) == list(got) == list(range(len(SIZES)))
    shapes = [shape for num_rows in SIZES for shape in ([8], [num_rows, HIDDEN_SIZE])]
    sends, posts = ranks.recorded(0), ranks.recorded(1)
    assert [shape for _, shape in sends] == [shape for _, shape in posts] == shapes, "number, order and size"

    transfers, ends, begins = ranks.ours(1, IntervalClass.RECV_XFER), [], []
    for step in sent:
        (header_ns, _), (payload_ns, _) = sends[2 * step : 2 * step + 2]
        assert sent[step]["t0"] - ERROR_NS <= header_ns <= payload_ns <= sent[step]["t1"] + ERROR_NS
        assert posts[2 * step + 1][0] <= got[step]["t0"] + ERROR_NS, "the wait begins once the receive is posted"
        assert header_ns - ERROR_NS <= transfers[step]["t1"], "and ends after it was sent"
        ends.append(abs(payload_ns - sent[step]["t1"]))
        begins.append(abs(header_ns - transfers[step]["t0"]))
        assert header_ns - posts[2 * step + 1][0] > LATE_S * 1e9 / 2, "what the first rank was late by is in both"
        assert transfers[step]["t0"] - got[step]["t0"] > LATE_S * 1e9 / 2
    assert statistics.median(ends) < ERROR_NS
    assert statistics.median(begins) < ERROR_NS


def test_a_stamp_of_another_hosts_clock_splits_nothing(make_ranks: MakeRanks) -> None:
    ranks = make_ranks("host-a", "host-b")
    ranks.run(SIZES[:3])
    got = ranks.ours(1, IntervalClass.RECV_WAIT)
    assert list(got) == [0, 1, 2]
    assert [step["bytes"] for step in got.values()] == [num_rows * HIDDEN_SIZE * 4 for num_rows in SIZES[:3]]
    assert ranks.ours(1, IntervalClass.RECV_XFER) == {}
    ends = [work.t1_ns for work in ranks.torchs(1, "gloo:recv")[1::2]]
    assert all(end <= step["t1"] + ERROR_NS for end, step in zip(ends, got.values(), strict=True))
