"""A model that was attached and is never called is said once, with what to do; an idle one is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from wait_kit import until

import insitu
from insitu.drain.no_steps import SILENT_S, NoSteps
from insitu.testing import Recording


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("insitu.drain.no_steps.monotonic", clock)
    return clock


def test_it_is_said_once_when_the_time_is_over(clock: Clock) -> None:
    watch = NoSteps("Linear")
    assert watch.look(0) is None
    clock.now = SILENT_S - 0.1
    assert watch.look(0) is None
    clock.now = SILENT_S
    said = watch.look(0)
    assert said is not None
    assert said.startswith("no step in 60 s: the Linear given to attach was not called; call that very object")
    clock.now = 10 * SILENT_S
    assert watch.look(0) is None


def test_a_model_that_had_a_step_is_idle_however_long_it_rests(clock: Clock) -> None:
    watch = NoSteps("Linear")
    watch.look(0)
    watch.look(1)
    clock.now = 10 * SILENT_S
    assert watch.look(1) is None


def test_a_detached_model_is_not_waited_for(clock: Clock) -> None:
    watch = NoSteps("Linear")
    watch.look(0)
    watch.stop()
    clock.now = SILENT_S
    assert watch.look(0) is None


def test_a_fork_since_is_the_likelier_reason(clock: Clock) -> None:
    watch = NoSteps(None)
    watch.look(0)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    clock.now = SILENT_S
    said = watch.look(0)
    assert said is not None
    assert "this process has forked since" in said
    assert "attach in the process that runs the model" in said


def test_a_session_says_it_in_log_and_record(
    clock: Clock, insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    attached, called = nn.Linear(4, 4), nn.Linear(4, 4)
    with insitu.attach(attached, to=insitu_records):
        until(lambda: insitu_records.rows("health"))  # the drain has looked once
        called(torch.zeros(1, 4))
        assert insitu_records.rows("events") == []
        clock.now = SILENT_S
        until(lambda: insitu_records.rows("events"))
    (row,) = insitu_records.rows("events")
    assert row["kind"] == "no_steps"
    assert f"insitu: {row['text']}" in caplog.messages
    assert len(caplog.messages) == 1


def test_a_session_whose_model_is_called_says_nothing(
    clock: Clock, insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Linear(4, 4)
    with insitu.attach(net, to=insitu_records) as session:
        net(torch.zeros(1, 4))
        session.flush()
        clock.now = SILENT_S
        session.flush()
    assert insitu_records.rows("events") == []
    assert caplog.messages == []


def test_a_detached_session_says_nothing(clock: Clock, insitu_records: Recording) -> None:
    with insitu.attach(nn.Linear(4, 4), to=insitu_records) as session:
        session.flush()
        session.detach()
        clock.now = SILENT_S
        session.flush()
    assert insitu_records.rows("events") == []


def test_a_session_without_a_model_says_nothing(clock: Clock, insitu_records: Recording) -> None:
    with insitu.start(to=insitu_records) as session:
        session.flush()
        clock.now = SILENT_S
        session.flush()
    assert insitu_records.rows("events") == []


def test_watching_loads_nothing_heavy() -> None:
    script = "import sys, insitu.drain.no_steps; print({'numpy', 'torch', 'pyarrow', 'grpc'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
