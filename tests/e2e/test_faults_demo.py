"""`insitu demo` in a hurry: Ctrl-C at any moment of its life, and two of them at once in one folder.

Told elsewhere already (tests/e2e/test_demo.py): a signal to the demo alone while the engine starts and in traffic, an
engine that dies, a demo killed outright.
"""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_kit import left_of, new_run
from live_system import Process
from wait_kit import until

from insitu.cli import ExitCode
from insitu_collector.store import open_store
from insitu_engine import demo
from insitu_engine.demo_plan import Plan

pytestmark = pytest.mark.timeout(180)
END_S = 20.0
PYTHON_S = 0.1
"""CPU time after which it is no longer Python that starts, and that answers an interrupt as it always does."""


class Demo(Process):
    """A demo as a shell starts it: in a process group of its own, in some folder; stdout may be a terminal."""

    def __init__(self, folder: Path, *options: str, has_terminal: bool = False) -> None:
        self.run = new_run()
        self._terminal, stdout = pty.openpty() if has_terminal else (-1, subprocess.PIPE)
        self._screen = bytearray()
        arguments = ["-m", "insitu", "demo", "--inject", "none", *options]
        super().__init__(arguments, {"INSITU_RUN": self.run}, folder=folder, own_session=True, stdout=stdout)
        if has_terminal:
            os.close(stdout)
            self._viewer = threading.Thread(target=self._view)
            self._viewer.start()

    def _view(self) -> None:
        with suppress(OSError):  # nobody has the terminal open any more
            while data := os.read(self._terminal, 4096):
                self._screen += data
        os.close(self._terminal)

    def interrupt(self) -> None:
        """Press Ctrl-C: the terminal signals the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, within_s: float) -> tuple[int, str]:
        """Return status and stdout. Fails when it takes longer, leaves a process, or says a traceback."""
        stdout, _ = self.process.communicate(timeout=within_s)
        self._reader.join()
        if self._terminal >= 0:
            self._viewer.join()
            stdout = self._screen.decode()
        assert left_of(self.run) == []
        assert not [line for line in self.lines if "Traceback" in line or "Error" in line], self.lines
        return self.process.returncode, stdout


@pytest.fixture
def demos() -> Iterator[list[Demo]]:
    """Hold what a test starts; nothing of it survives the test."""
    started: list[Demo] = []
    yield started
    for left in started:
        left_of(left.run, timeout_s=0)
        left.process.communicate()


@dataclass(frozen=True)
class Moment:
    """A stretch of a demo's life: from a line it says (none: from the start of Python), for so long."""

    line: str | None
    begin_s: float
    end_s: float

    def wait(self, demo: Demo, chance: random.Random) -> None:
        """Return somewhere in it, or when the demo has ended."""
        if self.line is None:
            until(lambda: sum(psutil.Process(demo.process.pid).cpu_times()[:2]) >= PYTHON_S, "CPU time")
        else:
            demo.wait_for(self.line)
        with suppress(subprocess.TimeoutExpired):
            demo.process.wait(chance.uniform(self.begin_s, self.end_s))


MOMENTS = {
    "import": Moment(None, 0.0, 0.5),
    "collector": Moment("collecting into", 0.0, 1.0),
    "engine": Moment("starting the engine", 0.0, 5.0),
    "traffic": Moment("ready after", 0.0, 1.0),
    "stopping": Moment("stopping: ", 0.0, 2.0),
    "answer": Moment("stopping: ", 1.0, 4.0),
    "pages": Moment("its pages stay on", 0.0, 1.0),
}
AFTER_TRAFFIC = ("stopping", "answer", "pages")


def interrupted(demos: list[Demo], folder: Path, name: str, chance: random.Random) -> None:
    """Run a demo, its dashboard too, press Ctrl-C at the moment, and look at what it leaves."""
    demo = Demo(folder, "--seconds", "1" if name in AFTER_TRAFFIC else "60", has_terminal=name == "pages")
    demos.append(demo)
    MOMENTS[name].wait(demo, chance)
    if demo.process.poll() is None:
        demo.interrupt()
    status, stdout = demo.end(END_S)
    assert status == ExitCode.INTERRUPTED or (status == ExitCode.OK and name in AFTER_TRAFFIC)
    assert "records" in stdout or status == ExitCode.INTERRUPTED, "all was told, or it says that it was not"
    for store in folder.glob("insitu-store/*"):
        if (store / "v1").exists():
            opened = open_store(store)
            num_rows = {table: opened.table(table).num_rows for table in opened.tables()}
            assert opened.damage == []
            assert name in ("import", "collector", "engine") or num_rows["intervals"] > 100


@pytest.mark.parametrize("name", ["import", "engine", pytest.param("stopping", marks=pytest.mark.matrix)])
def test_ctrl_c_ends_it_in_order(tmp_path: Path, model: Path, demos: list[Demo], name: str) -> None:
    interrupted(demos, tmp_path, name, random.Random(f"{name} 1"))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", MOMENTS)
def test_ctrl_c_at_many_moments(tmp_path: Path, model: Path, demos: list[Demo], name: str, seed: int) -> None:
    interrupted(demos, tmp_path, name, random.Random(f"{name} {seed}"))


def test_ctrl_c_at_the_moment_it_is_ready_still_gives_an_answer(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(text: str) -> None:
        if text.startswith("ready after"):
            signal.raise_signal(signal.SIGINT)

    run = new_run()
    monkeypatch.setenv("INSITU_RUN", run)
    monkeypatch.setattr(demo, "say", say)
    plan = Plan(model=model, num_stages=2, store=tmp_path / "store", seconds=60, seed=0, specs=())
    answers: list[dict[str, Any]] = []
    assert demo.run_demo(plan, answers.append), "somebody ended it early"
    [answer] = answers
    assert answer["requests"]["failed"] == 0
    kept = answer["records"]
    assert kept["produced"] == kept["stored"] + sum(kept["dropped"].values()) > 0
    assert left_of(run) == []


@pytest.mark.matrix
def test_two_at_once_in_one_folder_have_a_store_and_an_answer_each(
    tmp_path: Path, model: Path, demos: list[Demo]
) -> None:
    demos += [Demo(tmp_path, "--json", "--headless", "--seconds", "2") for _ in range(2)]
    ended = [demo.end(within_s=90) for demo in demos]
    assert [status for status, _ in ended] == [0, 0]
    answers = [json.loads(stdout) for _, stdout in ended]
    stores = {answer["store"] for answer in answers}
    assert len(stores) == 2
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("insitu-store/*")} == stores
    for answer in answers:
        kept = answer["records"]
        assert kept["produced"] == kept["stored"] + sum(kept["dropped"].values())
        runs = set(open_store(tmp_path / answer["store"]).table("sources")["run"].to_pylist())
        assert len(runs) == 1, "nobody else's rows"
        assert answer["requests"]["completed"] > 0
