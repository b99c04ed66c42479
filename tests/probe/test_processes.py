"""Several processes, models and sessions: each has its own identity, loses nothing, and nobody hangs."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

import insitu
from insitu.segments.shard import TailReader, list_segments
from insitu.testing import Recording
from insitu.vocabulary import IntervalClass

CHILDREN = """
import multiprocessing, os, sys, torch
from torch import nn
import insitu

def work(number, session):
    net = nn.Linear(4, 4)
    if session is None:  # spawned: nothing came along
        session = insitu.attach(net, to=TO)
    for _ in range(3):
        with session.step():
            session.event(f"child {number}")
    report = session.close(60)
    assert report.pending == 0 and not report.dropped, report
    os.write(1, f"{session.source.epoch}\\n".encode())  # in one piece: others print at the same time

TO = sys.argv[1]
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    torch.set_num_threads(1)
    model = nn.Linear(4, 4)
    session = insitu.attach(model, to=TO)
    with torch.no_grad():
        model(torch.zeros(2, 4))
    mine = session if sys.argv[2] == "fork" else None
    workers = [context.Process(target=work, args=(number, mine)) for number in range(int(sys.argv[3]))]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert [worker.exitcode for worker in workers] == [0] * len(workers), [worker.exitcode for worker in workers]
    with torch.no_grad():
        model(torch.zeros(2, 4))
    session.event("parent")
    report = session.close(60)
    assert report.pending == 0 and not report.dropped, report
"""

STORM = """
import os, sys, threading, torch
from torch import nn
import insitu

torch.set_num_threads(1)
net, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.zeros(2, 8)
with torch.no_grad(), insitu.attach(net, to=sys.argv[1]) as session:
    children = []
    for number in range(int(sys.argv[2])):
        for _ in range(20):
            net(x)
            session.event("parent", "x" * 200)
        session._drain.wake()  # the fork below falls into a cycle of the drain, now early and now late in it
        threading.Event().wait(number % 10 * 0.0005)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                net(x)
                session.event("child")
                report = session.close(60)
                status = 0 if report.pending == report.dropped == 0 else 2
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(statuses), statuses
"""


def run(script: str, folder: Path, *arguments: str) -> str:
    """Run a script as a program of its own; fails with what it said."""
    file = folder / "program.py"
    file.write_text(textwrap.dedent(script))
    ran = subprocess.run([sys.executable, str(file), *arguments], capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout


def stored(store: Path, table: str) -> pa.Table:
    """Return all rows of a table of a store, sealed or not."""
    batches = []
    for name in sorted({*list_segments(store, "open", table), *list_segments(store, "sealed", table)}):
        reader = TailReader(store, name)
        batches += [batch.data for batch in reader.read(final=True)]
        reader.close()
    return pa.Table.from_batches(batches)


def kinds(store: Path) -> dict[int, Counter[str]]:
    """Return by epoch how many events there are of each kind."""
    found: dict[int, Counter[str]] = {}
    for row in stored(store, "events").to_pylist():
        found.setdefault(row["epoch"], Counter())[row["kind"]] += 1
    return found


@pytest.mark.parametrize(("method", "num_children"), [("fork", 3), ("spawn", 2), ("forkserver", 2)])
def test_row_14_each_child_writes_as_itself_and_the_parent_goes_on(
    method: str, num_children: int, tmp_path: Path
) -> None:
    said = run(CHILDREN, tmp_path, f"file://{tmp_path}/store", method, str(num_children))
    epochs = [int(line) for line in said.split()]
    found = kinds(tmp_path / "store")
    (parent,) = set(found) - set(epochs)
    assert len(set(epochs)) == num_children
    assert found[parent] == {"parent": 1}
    assert sorted(next(iter(found[epoch])) for epoch in epochs) == [f"child {number}" for number in range(num_children)]
    assert all(found[epoch].total() == 3 for epoch in epochs)
    steps = Counter(stored(tmp_path / "store", "steps")["epoch"].to_pylist())
    assert steps == {parent: 2} | dict.fromkeys(epochs, 3)
    sources = stored(tmp_path / "store", "sources").to_pylist()
    assert len({row["pid"] for row in sources}) == num_children + 1
    assert len({row["run"] for row in sources}) == 1


@pytest.mark.parametrize("num_children", [20, pytest.param(100, marks=pytest.mark.soak)])
def test_forks_in_the_middle_of_the_drains_work_neither_hang_nor_lose_a_row(tmp_path: Path, num_children: int) -> None:
    run(STORM, tmp_path, f"file://{tmp_path}/store", str(num_children))
    found = kinds(tmp_path / "store")
    assert sorted(found.values(), key=Counter.total) == [{"child": 1}] * num_children + [{"parent": 20 * num_children}]
    steps = sorted(Counter(stored(tmp_path / "store", "steps")["epoch"].to_pylist()).values())
    assert steps == [1] * num_children + [20 * num_children]


@pytest.mark.parametrize("to", ["file", "spool"])
def test_a_child_that_goes_to_another_folder_writes_into_the_same_store(tmp_path: Path, to: str) -> None:
    script = """
        import os, sys
        import insitu

        os.chdir(sys.argv[1])
        os.mkdir("other")
        spool = "store" if sys.argv[2] == "spool" else None
        session = insitu.start(rank=0, to="grpc://127.0.0.1:9" if spool else "file://./store", spool=spool)
        child = os.fork()
        if child == 0:
            os.chdir("other")
        session.event("child" if child == 0 else "parent")
        report = session.close()
        assert report.pending == report.dropped == 0, report
        if child:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    run(script, tmp_path, str(tmp_path), to)
    assert list((tmp_path / "other").iterdir()) == []
    assert sorted(map(dict, kinds(tmp_path / "store").values()), key=str) == [{"child": 1}, {"parent": 1}]


def test_a_child_that_records_nothing_leaves_no_trace(tmp_path: Path) -> None:
    net = nn.Linear(4, 4)
    with insitu.attach(net, to=f"file://{tmp_path}") as session:
        session.flush()
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not list(tmp_path.glob(f"v1/*-{child}.*"))
        assert not [name for name in list_segments(tmp_path, "open") if name.shard.endswith(f"-{child}")]


def test_a_child_that_cannot_write_says_so_and_its_model_runs_on(tmp_path: Path) -> None:
    script = """
        import os, shutil, sys, torch
        from torch import nn
        import insitu

        net = nn.Linear(4, 4)
        session = insitu.attach(net, to="file://" + sys.argv[1])
        session.flush()
        child = os.fork()
        if child == 0:
            os.rename(sys.argv[1], sys.argv[1] + ".gone")
            open(sys.argv[1], "w").close()  # a file where the store was
            net(torch.zeros(2, 4))
            session.event("lost")
            session.close(1.0)
            stats = session.stats()
            assert stats.dropped["events"] == {"probe_error": 1}, stats.dropped
            assert stats.durable == {}
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.remove(sys.argv[1])
        os.rename(sys.argv[1] + ".gone", sys.argv[1])
        session.event("kept")
    """
    run(script, tmp_path, str(tmp_path / "store"))
    assert [sum(counts.values()) for counts in kinds(tmp_path / "store").values()] == [1]


def test_a_child_forked_with_every_slab_taken_has_them_all(insitu_records: Recording) -> None:
    net = nn.Linear(4, 4)
    with torch.no_grad(), insitu.attach(net, to=insitu_records, max_rows=8) as session:
        observer = session._observer
        assert observer is not None
        net(torch.zeros(2, 4))
        session.flush()
        while observer.slabs.ring.take() is not None:
            pass
        child = os.fork()
        if child == 0:
            insitu_records.batches.clear()
            net(torch.zeros(2, 4))
            session.close()
            rows = insitu_records.rows("steps")
            os._exit(0 if [row["dropped"] for row in rows] == [0] and session.stats().num_steps == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        observer.slabs.ring.free(observer.slabs.ring.num_taken)


def test_two_models_of_a_process_have_a_session_each_and_share_a_store(tmp_path: Path) -> None:
    nets = [nn.Linear(4, 4), nn.Linear(4, 4)]
    sessions = [insitu.attach(net, to=f"file://{tmp_path}", replica=number) for number, net in enumerate(nets)]
    for number, net in enumerate(nets):
        for _ in range(number + 1):
            net(torch.zeros(2, 4))
    sessions[0].close()
    nets[0](torch.zeros(2, 4))
    nets[1](torch.zeros(2, 4))
    sessions[1].close()
    steps = Counter(stored(tmp_path, "steps")["epoch"].to_pylist())
    assert [steps[session.source.epoch] for session in sessions] == [1, 3]


def test_what_two_models_tap_and_time_by_name_is_told_of_the_one_whose_step_is_open() -> None:
    class Tapping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with insitu.interval("host"):
                return insitu.tap(x, "mine")

    recordings, nets = [Recording(), Recording()], [Tapping(), Tapping()]
    sessions = [insitu.attach(net, to=to) for net, to in zip(nets, recordings, strict=True)]
    for value in (1.0, float("inf")):
        nets[0](torch.full((2,), value))
    nets[1](torch.full((2,), 3.0))
    for session in sessions:
        assert session.coverage().fired == 2
        session.close()
    (site,) = (row["site"] for row in recordings[0].rows("sites") if row["name"] == "mine")
    assert [row["canary"] for row in recordings[0].rows("summaries", site=site)] == [float("inf")]
    host = int(IntervalClass.HOST)
    assert [len(recording.rows("intervals", cls=host)) for recording in recordings] == [2, 1]


def test_a_session_that_was_closed_lets_go_of_the_model_and_its_slabs(insitu_records: Recording) -> None:
    net = nn.Linear(4, 4)
    session = insitu.attach(net, to=insitu_records, rules=[insitu.Rule(sites="*", requests="all")])
    for _ in range(3):
        net(torch.zeros(2, 4))
    assert session._observer is not None
    left = [weakref.ref(each) for each in (session, session._observer, session._observer.slabs, net)]
    session.close()
    del session, net
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


def test_a_model_can_be_attached_again_after_detach_and_after_close(insitu_records: Recording) -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    expected = net(x)
    others = [insitu_records, Recording(), Recording()]
    first = insitu.attach(net, to=others[0])
    assert torch.equal(net(x), expected)
    first.detach()
    assert torch.equal(net(x), expected)
    second = insitu.attach(net, to=others[1])
    assert torch.equal(net(x), expected)
    second.close()
    third = insitu.attach(net, to=others[2])
    assert torch.equal(net(x), expected)
    third.close()
    first.event("still here")
    first.close()
    assert [len(each.rows("steps")) for each in others] == [1, 1, 1]
    assert [row["kind"] for row in others[0].rows("events")] == ["still here"]
    assert len({session.source.epoch for session in (first, second, third)}) == 3
