"""Children that cannot be left behind: asked to end, killed at a deadline, and told apart when they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from insitu_engine.processes import Child, ChildFailed, Children, Interrupted


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `insitu WORD` be `python WORD.py`: a child of any behaviour, through the real start."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -u -c "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def alive(pid: int) -> bool:
    return bool(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)


READY = "import sys, time; print('ready on 42', file=sys.stderr); "
FOR_EVER = "time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


@pytest.mark.usefixtures("commands")
def test_a_line_of_stderr_says_it_is_ready() -> None:
    with Children() as children:
        child = children.start("server", [READY + FOR_EVER])
        found = child.wait_for_line(r"ready on (\d+)", 30, children.interrupted)
        children.check()
    assert found[1] == "42"
    assert not alive(child.process.pid)


@pytest.mark.usefixtures("commands")
def test_a_child_that_dies_is_named_with_its_last_line() -> None:
    script = "import sys; print('Error: no such port', file=sys.stderr); print(file=sys.stderr); sys.exit(3)"
    with Children() as children:
        child = children.start("the collector", [script])
        with pytest.raises(ChildFailed, match=r"^the collector ended with status 3: no such port$"):
            child.wait_for_line("ready", 30, children.interrupted)
        with pytest.raises(ChildFailed, match="status 3"):
            children.check()


@pytest.mark.usefixtures("commands")
def test_a_child_that_is_killed_is_named_with_the_signal() -> None:
    with Children() as children:
        child = children.start("rank 1", [READY + FOR_EVER])
        child.wait_for_line("ready", 30, children.interrupted)
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.wait()
        with pytest.raises(ChildFailed, match=r"^rank 1 was killed by SIGKILL: ready on 42$"):
            children.check()


@pytest.mark.usefixtures("commands")
def test_only_a_named_child_may_end_and_only_well() -> None:
    with Children() as children:
        well = children.start("load", ["pass"])
        badly = children.start("other", ["raise SystemExit(1)"])
        well.process.wait()
        badly.process.wait()
        with pytest.raises(ChildFailed, match=r"^other ended"):
            children.check(well, badly)


@pytest.mark.usefixtures("commands")
def test_silence_is_an_error_too() -> None:
    with Children() as children:
        child = children.start("server", ["import time; " + FOR_EVER])
        with pytest.raises(ChildFailed, match="server said nothing of being ready within 0 s"):
            child.wait_for_line("ready", 0.2, children.interrupted)


@pytest.mark.usefixtures("commands")
def test_what_an_asked_child_prints_last_is_kept() -> None:
    script = (
        "import signal, sys, time\n"
        "def end(*_):\n    print('{\"last\": 1}')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n" + READY + FOR_EVER
    )
    with Children() as children:
        child = children.start("server", [script])
        child.wait_for_line("ready", 30, children.interrupted)
        assert children.stop(child, deadline_s=30)
    assert list(child.stdout) == ['{"last": 1}']


@pytest.mark.usefixtures("commands")
def test_a_deaf_child_and_its_children_are_killed_at_the_deadline() -> None:
    grandchild_script = DEAF + "import time; " + FOR_EVER
    script = (
        DEAF + "import subprocess, sys, time\n"
        f"grandchild = subprocess.Popen([{sys.executable!r}, '-c', {grandchild_script!r}])\n"
        "print('grandchild', grandchild.pid, file=sys.stderr)\n" + FOR_EVER
    )
    with Children() as children:
        child = children.start("server", [script])
        grandchild = int(child.wait_for_line(r"grandchild (\d+)", 30, children.interrupted)[1])
        assert not children.stop(child, deadline_s=0.3)
    assert not alive(child.process.pid)
    psutil.wait_procs([psutil.Process(grandchild)] if psutil.pid_exists(grandchild) else [], timeout=10)
    assert not alive(grandchild)


@pytest.mark.usefixtures("commands")
def test_a_signal_ends_every_wait_and_leaves_nobody() -> None:
    before = signal.getsignal(signal.SIGTERM)
    started: list[Child] = []
    with Children() as children:
        started.append(children.start("one", [READY + FOR_EVER]))
        started.append(children.start("two", [READY + FOR_EVER]))
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            started[0].wait_for_line("never said", 30, children.interrupted)
        with pytest.raises(Interrupted):
            children.check()
        with pytest.raises(Interrupted):
            children.start("three", [READY + FOR_EVER])
    assert not any(alive(child.process.pid) for child in started)
    assert signal.getsignal(signal.SIGTERM) is before


WAITS = """
import os
from insitu_engine.processes import Children

with Children() as children:
    print("ready", flush=True)
    while not children.interrupted.wait(0.0):  # it is inside of the wait nearly all the time
        pass
    print("stopped", flush=True)
    os._exit(0)  # what comes after the block is not asked here
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_many_signals_at_once_stop_who_waits(number: signal.Signals) -> None:
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            for _ in range(30):
                process.send_signal(number)
            try:
                said, _ = process.communicate(timeout=10)
            finally:
                process.kill()
            assert said == "stopped\n"


@pytest.mark.usefixtures("commands")
def test_a_second_signal_ends_a_deaf_child_before_its_deadline() -> None:
    with Children() as children:
        child = children.start("server", [DEAF + READY + FOR_EVER])
        child.wait_for_line("ready", 30, children.interrupted)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not children.stop(child, deadline_s=600)
    assert not alive(child.process.pid)


def test_a_child_does_not_outlive_a_parent_that_is_killed() -> None:
    script = (
        "import time\n"
        "from insitu_engine.processes import Children\n"
        "with Children() as children:\n"
        "    child = children.start('load', ['load', '--url', 'http://192.0.2.1', '--seconds', '600'])\n"
        "    print(child.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
    _, left = psutil.wait_procs([child], timeout=30)
    assert left == []
