"""One rank's loop over a real socket: what it answers, and what it says of its time."""

from __future__ import annotations

import fcntl
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import insitu
from insitu.testing import Recording, expect
from insitu.vocabulary import IntervalClass
from insitu_engine.messages import Frames, Idle, RowPlan, Sampled, Sampling, StepPlan, Stop, Traffic, frame, to_driver
from insitu_engine.rank import Rank, row_map
from insitu_engine.rank_link import DriverGone, Link


def plan(step_id: int, position: int, count: int, **times: int) -> StepPlan:
    row = RowPlan("r", 0, count, position, "prefill", 0, False, [1, 2], [5] * count, Sampling())
    return StepPlan(step_id, 0, "prefill", count, 1, [row], [], **times)


class Driven:
    """A single rank on a thread of its own, and the driver's end of its socket."""

    def __init__(self, engine: Any, folder: Path, records: Recording) -> None:
        local = engine(folder, 1)
        self.ours, theirs = socket.socketpair()
        self.session = insitu.attach(local.stages[0], to=records, max_rows=8, axes={"logits": "samples"})
        self.rank = Rank(0, 1, Link(theirs), local.stages[0], local.caches[0], None, self.session, None)
        self.error: BaseException | None = None
        self._theirs = theirs
        self._frames = Frames(to_driver)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self.rank.run()
        except DriverGone as error:
            self.error = error

    def send(self, *messages: Any) -> None:
        for message in messages:
            self.ours.sendall(frame(message))

    def answer(self) -> Any:
        while True:
            found = list(self._frames.feed(self.ours.recv(4096)))
            if found:
                return found[0]

    def wait_until_read(self) -> None:
        """Return once the rank has read all that was sent: it does so only while it waits for a plan."""
        while int.from_bytes(fcntl.ioctl(self._theirs, termios.FIONREAD, bytes(4)), sys.byteorder):
            time.sleep(0)

    def end(self) -> None:
        self.ours.close()
        self._thread.join()
        self.session.close()
        self._theirs.close()
        self.rank._link._reader.close()


@pytest.fixture
def driven(make_checkpoint: Callable[..., Path], local_engine: Any, insitu_records: Recording) -> Any:
    made = Driven(local_engine, make_checkpoint(), insitu_records)
    yield made
    made.end()


def test_a_step_is_answered_by_its_sampled_ids(driven: Driven, insitu_records: Recording) -> None:
    driven.send(Traffic(0), plan(0, 0, 3))
    answer = driven.answer()
    assert isinstance(answer, Sampled)
    assert (answer.step_id, answer.mb, len(answer.ids)) == (0, 0, 1)
    driven.send(Stop())
    driven.end()
    step = expect(insitu_records.rows("steps"), step_id=0)
    assert step["num_rows"] == 3
    assert [entry["request"] for entry in step["rows"]] == ["r"]


def test_the_rank_ends_when_its_driver_does(driven: Driven) -> None:
    driven.end()
    assert isinstance(driven.error, DriverGone)


def test_a_wait_is_split_by_the_times_the_driver_states(driven: Driven, insitu_records: Recording) -> None:
    driven.send(plan(0, 0, 3))
    driven.answer()
    driven.send(Idle(time.monotonic_ns()))
    driven.wait_until_read()
    demand, ready, sent = (time.monotonic_ns() + at for at in (0, 1000, 2000))
    driven.send(plan(1, 3, 1, demand_since_ns=demand, ready_ns=ready, send_ns=sent))
    driven.answer()
    driven.send(Stop())
    driven.end()
    rows = {IntervalClass(row["cls"]): row for row in insitu_records.rows("intervals") if row["t1_ns"] > demand - 1}
    idle = expect(insitu_records.rows("intervals"), t1_ns=demand)
    assert (idle["cls"], idle["step_id"], idle["peer"]) == (IntervalClass.IDLE, -1, -1)
    wait = expect(insitu_records.rows("intervals"), t0_ns=demand)
    assert (wait["cls"], wait["step_id"], wait["peer"]) == (IntervalClass.RECV_WAIT, 1, -1)
    assert wait["t1_ns"] == sent, "a rank that samples itself waits for the driver alone"
    transfer = expect(insitu_records.rows("intervals"), t0_ns=sent)
    assert (transfer["cls"], transfer["step_id"]) == (IntervalClass.RECV_XFER, 1)
    assert IntervalClass.COMPUTE in rows


def test_the_end_of_a_rank_is_of_no_step(driven: Driven, insitu_records: Recording) -> None:
    driven.send(plan(0, 0, 3))
    driven.answer()
    driven.send(Idle(time.monotonic_ns()))
    driven.wait_until_read()
    stop = time.monotonic_ns()
    driven.send(Stop())
    driven.end()
    late = [row for row in insitu_records.rows("intervals") if row["t1_ns"] > stop]
    assert {row["cls"] for row in late} >= {IntervalClass.IDLE, IntervalClass.HOST}
    assert {(row["step_id"], row["mb"]) for row in late} == {(-1, -1)}


def test_no_nanosecond_between_steps_is_unaccounted_for(driven: Driven, insitu_records: Recording) -> None:
    for step_id in range(6):
        driven.send(plan(step_id, step_id, 1, send_ns=time.monotonic_ns()))
        driven.answer()
    driven.send(Stop())
    driven.end()
    rows = sorted(insitu_records.rows("intervals"), key=lambda row: int(row["t0_ns"]))
    first = next(at for at, row in enumerate(rows) if row["step_id"] == 0)
    rows = rows[first:]  # before it, a collection may have struck outside any interval
    gaps = [(a, b) for a, b in pairwise(rows) if a["t1_ns"] != b["t0_ns"]]
    assert gaps == []
    classes = {row["cls"] for row in rows if row["step_id"] == 3}
    assert {IntervalClass.COMPUTE, IntervalClass.SAMPLE, IntervalClass.HOST} <= classes


def test_rows_become_the_probes_row_map() -> None:
    row = RowPlan("r", 4, 2, 9, "decode", 1, True, [3], [1, 2], Sampling())
    assert row_map([row]) == [
        insitu.Rows("r", start=4, count=2, position=9, phase="decode", sample_row=1, capture=True)
    ]
