"""What `insitu run` costs `transformers serve`: servers with it and without, asked over HTTP in turns."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Final

from integration_turns import AGAIN, ATTACHED, DETACHED, Job, Measured, in_turns, model_of
from llamas import TINY

from insitu_collector.store import open_store

SERVE: Final = "from transformers.cli.transformers import main; main()"
READY_S: Final = 120.0
ASK_AGAIN_S: Final = 0.1
REQUESTS: Final = 4
"""Of a turn, one after the other: the drain works once a second, and most of it should fall into its own turn."""


class Server:
    """One `transformers serve` of one model."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, model: Path, log: Path) -> None:
        self._process, self._log, self.pid = process, log, process.pid
        self._url, self._model = f"http://127.0.0.1:{port}/v1/completions", str(model)

    def complete(self, num_tokens: int) -> None:
        """Ask for so many tokens and wait for them."""
        body = {"model": self._model, "prompt": "Once there was a brave farmer", "max_tokens": num_tokens}
        request = urllib.request.Request(
            self._url, json.dumps({**body, "temperature": 0}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=READY_S) as answer:
            found: dict[str, Any] = json.load(answer)
        assert found["usage"]["completion_tokens"] == num_tokens, found

    def wait_until_ready(self) -> None:
        """Wait until it answers. Raises RuntimeError with its last line, TimeoutError."""
        pause, until = Event(), time.monotonic() + READY_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"transformers serve ended: {self._log.read_text().splitlines()[-1:]}")
            try:
                return self.complete(1)
            except urllib.error.HTTPError:
                raise
            except urllib.error.URLError:
                pause.wait(ASK_AGAIN_S)
        raise TimeoutError(f"transformers serve did not answer within {READY_S:.0f} s")


def served(job: Job, *, is_continuous: bool) -> Measured:
    """Measure requests of one prompt each. is_continuous: with `--continuous-batching`."""
    options = ["--continuous-batching", "--cb-num-blocks", "32", "--cb-max-batch-tokens", "64"] if is_continuous else []
    with ExitStack() as started:
        model = checkpoint(job)
        servers = {
            name: started.enter_context(serving(model, job, name, options)) for name in (DETACHED, AGAIN, ATTACHED)
        }
        for server in servers.values():
            server.wait_until_ready()

        def ask(server: Server) -> Callable[[], None]:
            def turn() -> None:
                for _ in range(REQUESTS):
                    server.complete(job.steps)

            return turn

        ways = {name: ask(server) for name, server in servers.items()}
        taken = in_turns(job, ways, {name: server.pid for name, server in servers.items()})
    num_steps = open_store(job.folder / "store").table("steps").num_rows
    assert num_steps >= job.rounds * REQUESTS * job.steps, f"{num_steps} steps were observed"
    name = "transformers serve" + (" --continuous-batching" if is_continuous else "")
    return Measured(f"{name}, {job.steps} tokens", "request", REQUESTS, *taken)


def checkpoint(job: Job) -> Path:
    """Write the model where a server can load it, with the shipped tokenizer."""
    folder = job.folder / "model"
    model_of(job).save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@contextmanager
def serving(model: Path, job: Job, name: str, options: list[str]) -> Iterator[Server]:
    """Start a server, under `insitu run` where it is to be attached; end it on leaving."""
    port = free_port()
    command = [sys.executable, "-c", SERVE, "serve", str(model), "--port", str(port), "--device", "cpu", *options]
    if name == ATTACHED:
        command = [sys.executable, "-m", "insitu", "run", "--to", job.store, "--", *command]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "*", "INSITU_OVERHEAD_BUDGET": "1.0"}
    log = job.folder / f"{name}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=said, stderr=said)
        try:
            yield Server(process, port, model, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
