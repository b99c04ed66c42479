"""Processes beside a collector end with it, however early it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from wait_kit import DEADLINE_S, until

STARTS_AND_DIES = """
import os, signal, sys
from insitu_collector.access.children import Child
from insitu_collector.service.companions import Companion

judge = Companion("the judge", ["judge", sys.argv[1]], Child("grpc://127.0.0.1:1")).start()
print(judge.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.timeout(60)
def test_one_that_has_only_begun_ends_with_a_collector_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    command = [sys.executable, "-c", STARTS_AND_DIES, str(tmp_path)]
    # The judge has this pipe as well: `run` comes back once both have ended.
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=DEADLINE_S)
    assert ended.returncode == -signal.SIGKILL
    until(lambda: is_gone(int(ended.stdout)), "its end")
