"""Forks wait for the drains, but not for long: in the child nothing is held by a thread that is not there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXPORTING = """
    import os, sys, threading, time
    import insitu
    from insitu.exporters.base import Ack, Level
    from insitu.identity import Source

    class Slow:
        '''Takes a first batch only when it is told to.'''
        is_in, may_go, num_taken = threading.Event(), threading.Event(), 0
        last = {{}}

        def export(self, batch):
            if not self.num_taken:
                self.is_in.set()
                self.may_go.wait(60)
            self.num_taken += 1
            self.last[batch.stream] = batch.seq
            return Ack(batch.stream, batch.seq, Level.DURABLE)

        def durable(self, stream): return self.last.get(stream, -1)
        def refused(self): return []
        def flush(self, timeout_s): return True
        def close(self, timeout_s): pass

    slow = Slow()
    session = insitu.start(rank=0, to=slow)
    assert slow.is_in.wait(20)
    {when}
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit({answer})
    took_s = time.monotonic() - began
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert took_s < 20
    slow.may_go.set()
    session.event("later")
    assert session.flush(20).pending == 0 and slow.num_taken > 1, "the drain goes on"
"""
FRESH = """
    import os, random, sys, threading, torch
    from torch import nn
    import insitu

    torch.set_num_threads(1)
    x = torch.zeros(2, 8)

    def parent(seed):
        random.seed(seed)
        net, children = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), []
        with torch.no_grad(), insitu.attach(net, to=sys.argv[1]) as session:
            for _ in range(4):
                for _ in range(random.randint(1, 20)):
                    net(x)
                session._drain.wake()
                threading.Event().wait(random.random() * 0.004)  # into its first cycles, at any place in them
                if not (child := os.fork()):
                    net(x)
                    os._exit(session.close(10).dropped)
                children.append(child)
            return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    for seed in range(int(sys.argv[2])):
        if not (pid := os.fork()):  # has imported everything, and computed nothing yet
            os._exit(any(parent(seed)))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, f"seed {seed}"
"""


def run(script: str, folder: Path, *arguments: str) -> None:
    """Run a script as a program of its own."""
    file = folder / "program.py"
    file.write_text(textwrap.dedent(script))
    ran = subprocess.run([sys.executable, str(file), *arguments], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr


def test_a_fork_waits_until_the_drain_is_out_of_an_export(tmp_path: Path) -> None:
    when = "os.register_at_fork(before=slow.may_go.set)  # called before ours, which were there first"
    run(EXPORTING.format(when=when, answer="not slow.num_taken"), tmp_path)


def test_a_fork_does_not_wait_for_an_exporter_that_hangs(tmp_path: Path) -> None:
    run(EXPORTING.format(when="", answer="slow.num_taken"), tmp_path)


@pytest.mark.parametrize("num_parents", [8, pytest.param(400, marks=pytest.mark.soak)])
def test_forks_while_a_process_computes_its_first_leave_children_that_can(tmp_path: Path, num_parents: int) -> None:
    run(FRESH, tmp_path, f"file://{tmp_path}/store", str(num_parents))
