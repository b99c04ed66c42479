"""`make fuzz`: a million hostile inputs against what takes them in, in processes that may die of it.

    python tests/collector/fuzz.py --inputs 1000000 --workers 2

Each input is made from its number. A worker that dies by a signal, hangs or grows names the input by that number; run
it alone with `--first NUMBER --inputs 1 --workers 1`. Prints how many inputs came past each check. Exit code 1: one was
not survived, or something accepted was not read back as it came.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import mmap
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Protocol

MAX_RSS_BYTES: Final = 512 << 20
HANG_S: Final = 30.0
"""Longest that a worker may take over one input (and over reading back what it took)."""
CHUNK: Final = 2000
"""Inputs between two times that what was accepted is read back."""


class Target(Protocol):
    """What takes inputs in. One is made for each chunk, over an empty folder."""

    CHECKS: ClassVar[tuple[str, ...]]
    """What an input has to come past, in order."""

    def __init__(self, folder: Path) -> None: ...

    def take(self, number: int) -> str:
        """Take the input of this number; return the check at which it was refused, or `accepted`."""
        ...

    def read_back(self) -> None:
        """Raises AssertionError when what was accepted is not there as it came."""
        ...


def load(name: str) -> type[Target]:
    """Return the target called `module:class`, of a module beside this one."""
    module, _, cls = name.partition(":")
    found: type[Target] = getattr(importlib.import_module(module), cls)
    return found


@dataclass
class Result:
    """What became of the inputs."""

    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    max_rss_bytes: int = 0

    def add(self, other: Result) -> None:
        self.refused.update(other.refused)
        self.faults += other.faults
        self.max_rss_bytes = max(self.max_rss_bytes, other.max_rss_bytes)

    def passed(self, checks: tuple[str, ...]) -> dict[str, int]:
        """Return how many inputs there were, and how many came past each check."""
        left = self.refused.total()
        found = {"inputs": left}
        for check in checks:
            left -= self.refused[check]
            found[check] = left
        return found


def run(target: str, first: int, num_inputs: int, num_workers: int) -> Result:
    """Try the inputs `first ..`, in as many processes at a time."""
    share = -(-num_inputs // num_workers)
    ranges = [(at, min(at + share, first + num_inputs)) for at in range(first, first + num_inputs, share)]
    total = Result()
    with ThreadPoolExecutor(num_workers) as pool:
        for result in pool.map(lambda each: _survive(target, *each), ranges):
            total.add(result)
    return total


def _survive(target: str, first: int, end: int) -> Result:
    """Run workers over a range until it is done; each that dies is told, and the next goes on behind that input."""
    total = Result()
    while first < end:
        with tempfile.NamedTemporaryFile() as marks:
            marks.write(first.to_bytes(8, "little"))
            marks.flush()
            result, why = _run_worker(target, first, end, Path(marks.name))
            total.add(result)
            if not why:
                break
            at = int.from_bytes(Path(marks.name).read_bytes(), "little")
            total.faults.append(f"input {at}: {why}")
            first = at + 1
    return total


def _run_worker(target: str, first: int, end: int, marks: Path) -> tuple[Result, str]:
    command = [sys.executable, __file__, "--worker", str(marks), "--target", target, "--first", str(first)]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen([*command, "--inputs", str(end - first)], stdout=subprocess.PIPE, stderr=said) as worker,
    ):
        watch = threading.Thread(target=_end_when_it_hangs, args=(worker, marks))
        watch.start()
        assert worker.stdout is not None, "it is a pipe"
        lines = worker.stdout.read().splitlines()
        code = worker.wait()
        watch.join()
        said.seek(0)
        why = said.read().decode(errors="replace").strip().splitlines()
    total = Result()
    for line in lines:
        found = json.loads(line)
        total.add(Result(Counter(found["refused"]), [], found["max_rss_bytes"]))
    if code == 0:
        return total, ""
    if code < 0:
        return total, "it hung" if code == -signal.SIGKILL else signal.Signals(-code).name
    return total, why[-1] if why else f"exit code {code}"


def _end_when_it_hangs(worker: subprocess.Popen[bytes], marks: Path) -> None:
    last, since = b"", time.monotonic()
    while True:
        try:
            worker.wait(1.0)
            return
        except subprocess.TimeoutExpired:
            now = marks.read_bytes()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > HANG_S:
                worker.kill()


def work(kind: type[Target], first: int, end: int, marks: Path) -> None:
    """Try a range of inputs in this process; print one line of JSON a chunk."""
    with marks.open("r+b") as file, mmap.mmap(file.fileno(), 8) as mark:
        for start in range(first, end, CHUNK):
            refused: Counter[str] = Counter()
            with tempfile.TemporaryDirectory() as folder:
                target = kind(Path(folder))
                for number in range(start, min(start + CHUNK, end)):
                    mark[:] = number.to_bytes(8, "little")
                    refused[target.take(number)] += 1
                target.read_back()
            rss_bytes = _peak_bytes()
            assert rss_bytes < MAX_RSS_BYTES, f"{rss_bytes} bytes of memory; the most is {MAX_RSS_BYTES}"
            print(json.dumps({"refused": refused, "max_rss_bytes": rss_bytes}), flush=True)


def _peak_bytes() -> int:
    """Return the most memory that this program held; `ru_maxrss` has that of who started it, too."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux tells it"
    return int(found[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--target", default="frame_target:FrameTarget", help="module:class, of a module beside this one"
    )
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    kind = load(asked.target)
    if asked.worker is not None:
        logging.disable(logging.CRITICAL)
        work(kind, asked.first, asked.first + asked.inputs, asked.worker)
        return 0
    began = time.monotonic()
    result = run(asked.target, asked.first, asked.inputs, asked.workers)
    seconds = time.monotonic() - began
    for check, num_inputs in result.passed(kind.CHECKS).items():
        print(f"{check:<24} {num_inputs:>9}  {num_inputs / max(1, asked.inputs):6.1%}")
    print(f"{seconds:.0f} s, {asked.inputs / seconds:.0f} inputs/s, peak {result.max_rss_bytes >> 20} MiB a process")
    print("\n".join(result.faults) or "all survived, and what was accepted was read back as it came")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
