"""The whole system on this machine: a collector and a two-stage engine as real processes, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-llama"
START_S = 60.0


class Process:
    """One `insitu ...` process whose stderr is read as it comes; with `own_session`, a terminal's foreground group."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str] | None = None,
        *,
        folder: Path | None = None,
        own_session: bool = False,
        stdout: int = subprocess.PIPE,
    ) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(environment or {})},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            start_new_session=own_session,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, pattern: str, timeout_s: float = START_S) -> re.Match[str]:
        """Return the first stderr line that matches; fails with what was said instead."""

        def found() -> re.Match[str] | None:
            return next((hit for line in self.lines if (hit := re.search(pattern, line))), None)

        with self._news:
            self._news.wait_for(lambda: found() or not self._reader.is_alive(), timeout_s)
        hit = found()
        assert hit is not None, f"no line matched {pattern!r}; it said: {self.lines}"
        return hit

    def stop(self, timeout_s: float = 30.0) -> str:
        """End it as an operator would, and return its stdout."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        stdout, _ = self.process.communicate(timeout=timeout_s)
        self._reader.join()
        return stdout


def free_port() -> int:
    """Return a port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def collecting(store: Path, port: int, *options: str) -> Iterator[Process]:
    """Run `insitu collect` until the block ends, unless the block has killed it."""
    collect = Process(["-m", "insitu", "collect", "--store", str(store), "--port", str(port), *options])
    try:
        collect.wait_for(r"collecting on (grpc://\S+)")
        yield collect
    finally:
        collect.stop()


@dataclass
class System:
    """A running collector and engine, and the account both gave when they ended."""

    store: Path
    url: str
    sources: list[dict[str, Any]]
    ended: bool = False
    to: str = ""
    """The collector's address."""

    def complete(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """Return the completion of one prompt; `capture=True` opts its rows in."""
        headers = {"insitu": "capture=rows"} if fields.pop("capture", False) else {}
        body = {"model": MODEL.name, "prompt": prompt, "ignore_eos": True, **fields}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)
        answer.raise_for_status()
        result: dict[str, Any] = answer.json()
        return result


@contextmanager
def running(
    folder: Path, serve: list[str], environment: dict[str, str] | None = None, collect_options: Sequence[str] = ()
) -> Iterator[System]:
    """Run both until the block ends; afterwards `sources` holds every process's own account."""
    store = folder / "store"
    command = ["-m", "insitu", "collect", "--store", str(store), "--port", "0", "--judge", *collect_options]
    collect = Process(command)
    to = collect.wait_for(r"collecting on (grpc://\S+)")[1]
    engine = Process([*serve, "--model", str(MODEL), "--port", "0", "--to", to], environment)
    system = System(store, "", [], to=to)
    try:
        system.url = engine.wait_for(r"ready on (http://[\w.:]+)")[1]
        yield system
    finally:
        accounts = [process.stop().splitlines()[-1:] for process in (engine, collect)]
    assert engine.process.returncode == 0, engine.lines
    system.sources = [source for (account,) in accounts for source in json.loads(account)["sources"]]
    system.ended = True
