"""A process that is asked to stop, however often and whenever, stops."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WAITS = """
import os
from insitu_collector.stopping import stopping

with stopping() as stop:
    print("ready", flush=True)
    while not stop.is_set():
        stop.wait(0.0001)  # it is inside of the event nearly all the time
    print("stopped", flush=True)
    os._exit(0)  # what comes after the block is not asked here
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_many_signals_at_once_are_one_wish(number: signal.Signals) -> None:
    """As the kernel sends them for each thread of a parent that is killed."""
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            for _ in range(30):
                process.send_signal(number)
            try:
                said, _ = process.communicate(timeout=10)
            finally:
                process.kill()
            assert said == "stopped\n"
