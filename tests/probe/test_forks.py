"""Forks wait for the drains, but not for long: in the child nothing is held by a thread that is not there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

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
                    os._exit(session.close(30).dropped > 0)
                children.append(child)
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            return [*statuses, session.close(30).dropped]

    for seed in range(int(sys.argv[2])):
        if not (pid := os.fork()):  # has imported everything, and computed and connected nothing yet
            bad = any(found := parent(seed))
            if bad:
                print(found, file=sys.stderr)
            os._exit(bad)
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


def test_a_turn_that_lasts_is_ended_for_a_fork(tmp_path: Path) -> None:
    script = """
        import os, threading
        from insitu import forks

        has_begun, may_end, again = threading.Event(), threading.Event(), threading.Event()
        num_turns = 0

        def work():
            global num_turns
            for event in (may_end, again):
                with forks.Turn(event.set):
                    has_begun.set()
                    event.wait(60)
                    num_turns += 1

        worker = threading.Thread(target=work)
        worker.start()
        has_begun.wait(20)
        child = os.fork()
        if child == 0:
            with forks.turn:  # those of the parent hold up nobody here
                os._exit(num_turns != 1 or forks.is_grpc_lost())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        again.set()
        worker.join(20)
        assert num_turns == 2, "they go on"
    """
    run(script, tmp_path)


def test_a_child_knows_that_its_parent_had_used_grpc(tmp_path: Path) -> None:
    script = """
        import os, sys
        import grpc
        from insitu import forks

        if sys.argv[1] == "used":
            grpc.insecure_channel("127.0.0.1:9").close()
        assert not forks.is_grpc_lost()
        child = os.fork()
        if child == 0:
            os._exit(forks.is_grpc_lost() != (sys.argv[1] == "used"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    run(script, tmp_path, "used")
    run(script, tmp_path, "imported")


def test_a_fork_does_not_wait_for_an_exporter_that_hangs(tmp_path: Path) -> None:
    run(EXPORTING.format(when="", answer="slow.num_taken"), tmp_path)


@pytest.mark.parametrize("num_parents", [3, pytest.param(400, marks=pytest.mark.soak)])
def test_forks_while_a_process_computes_its_first_leave_children_that_can(tmp_path: Path, num_parents: int) -> None:
    run(FRESH, tmp_path, f"file://{tmp_path}/store", str(num_parents))


@pytest.mark.parametrize("num_parents", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_row_14_children_forked_at_any_time_of_a_connection_live_and_ship_all(tmp_path: Path, num_parents: int) -> None:
    """A child of a process that has gRPC inside of it hung in its imports, or was ended by its core, one in forty."""
    with CollectorServer(tmp_path / "store", port=0) as server:
        run(FRESH, tmp_path, server.address, str(num_parents))
    steps = Counter(open_store(tmp_path / "store").table("steps")["epoch"].to_pylist())
    assert sorted(steps.values())[: 4 * num_parents] == [1] * 4 * num_parents
    assert len(steps) == 5 * num_parents
