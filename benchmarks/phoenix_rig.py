"""Arize Phoenix, in an environment of its own: a backend of OTLP that comes as a Python package."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Final

from insitu_engine.processes import ChildFailed

READY_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Phoenix:
    """A running Phoenix."""

    address: str
    """HOST:PORT of OTLP/gRPC."""
    url: str
    """Of its pages and its API."""
    pid: int
    database: Path
    """SQLite."""


@contextmanager
def phoenix(python: Path, folder: Path) -> Iterator[Phoenix]:
    """Run Phoenix as its documentation has it: one process, a SQLite file in its working directory.

    Raises FileNotFoundError where it is not installed, ChildFailed, TimeoutError.
    """
    if not python.exists():
        raise FileNotFoundError(f"it is not installed ({python})")
    folder.mkdir()
    http, port = _free_port(), _free_port()
    told = {"PHOENIX_WORKING_DIR": str(folder), "PHOENIX_PORT": str(http), "PHOENIX_GRPC_PORT": str(port)}
    own = {"PHOENIX_HOST": "127.0.0.1", "PHOENIX_TELEMETRY_ENABLED": "false", "PYTHONPATH": ""}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(python), "-m", "phoenix.server.main", "serve"],
            env={**os.environ, **told, **own},
            stdout=log,
            stderr=log,
        )
    try:
        for each in (port, http):
            _wait_listening(process, each, folder / "log")
        yield Phoenix(f"127.0.0.1:{port}", f"http://127.0.0.1:{http}", process.pid, folder / "phoenix.db")
    finally:
        process.terminate()
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until a port is answered. Raises ChildFailed, TimeoutError."""
    pause, deadline = Event(), time.monotonic() + READY_S
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if process.poll() is not None:
            last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise ChildFailed(f"it ended with status {process.returncode}: {' | '.join(last[-2:])}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not listen within {READY_S:.0f} s")
        pause.wait(0.1)
