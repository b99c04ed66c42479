"""Who starts engines of vLLM waits for the end of their sessions, and not for that of the processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from insitu.vllm.ending import FILE, Endings
from insitu_collector.store import open_store

RANK = """
import sys, insitu
from insitu.vllm.ending import Ending
session = insitu.start(to=sys.argv[1])
ending = Ending(session)
session.event("last")
print("began", flush=True)
sys.stdin.readline()
ending.close_beside(lambda: print("ending", flush=True))
sys.stdin.readline()
"""


@contextmanager
def rank(endings: Endings, store: Path) -> Iterator[subprocess.Popen[str]]:
    with endings.told():
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, f"file://{store}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    try:
        assert process.stdout is not None and process.stdout.readline() == "began\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("end\n")
    process.stdin.flush()


def test_it_waits_for_each_session_and_for_no_process(tmp_path: Path) -> None:
    endings = Endings()
    with rank(endings, tmp_path / "a") as first, rank(endings, tmp_path / "b") as second:
        tell(first)
        assert not endings.wait(0.5), "the other one goes on"
        tell(second)
        assert endings.wait(60)
        assert first.poll() is None and second.poll() is None
        stored = [open_store(str(tmp_path / each)).table("events")["kind"].to_pylist() for each in ("a", "b")]
    assert stored == [["last"], ["last"]]


def test_one_that_dies_is_waited_for_no_longer(tmp_path: Path) -> None:
    endings = Endings()
    with rank(endings, tmp_path) as process:
        assert not endings.wait(0)
        process.kill()
        assert endings.wait(60)


AT_EXIT = """
import atexit, sys, insitu
from insitu.vllm.ending import Ending
session = insitu.start(to=sys.argv[1])
session.event("last")
atexit.register(lambda: Ending(session).close_beside(lambda: print("ended")))
"""


def test_a_session_is_closed_where_python_ends(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", AT_EXIT, f"file://{tmp_path}"], capture_output=True, text=True, timeout=60
    )
    assert (ran.stdout, ran.stderr) == ("ended\n", "")
    assert open_store(str(tmp_path)).table("events")["kind"].to_pylist() == ["last"]


def test_nobody_is_waited_for_where_nobody_began() -> None:
    endings = Endings()
    assert endings.wait(0)
    with endings.told():
        name = os.environ[FILE]
    assert FILE not in os.environ and Path(name).exists()
    del endings
    assert not Path(name).exists()
