"""Each example in the help of each command works when pasted, into a folder that has a store and a tokens file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import pytest
import torch
from live_system import Process
from torch import nn

import insitu
from insitu import cli
from insitu_collector.access.roles import Role
from insitu_collector.access.token_file import append_entry
from insitu_collector.access.tokens import Entry
from insitu_collector.service.server import CollectorServer

pytestmark = pytest.mark.timeout(240)

READY: Final = re.compile(r"^(ready after|insitu serve: ready on|collecting on|judging|sending|.*dashboard on) ")
"""What a command that goes on until it is told to stop says once it works."""
SERVER: Final = "http://127.0.0.1:8000"
"""The examples of `insitu load` speak to a server on the usual port; here it has a free one."""
COLLECTOR: Final = "127.0.0.1:4317"
"""Those of `insitu rules` to a collector on the usual port."""
NUM_AT_ONCE: Final = 3
WAIT_S: Final = 90.0


def commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all below it, by the words that call them."""
    yield name, command
    if isinstance(command, click.Group) and name != "insitu":
        for word, sub in command.commands.items():
            yield from commands(f"{name} {word}", sub)


def all_commands() -> dict[str, click.Command]:
    found = dict(commands("insitu", cli.insitu))
    context = click.Context(cli.insitu)
    for name in cli.COMMANDS:
        command = cli.insitu.get_command(context, name)
        assert command is not None
        found.update(commands(f"insitu {name}", command))
    return found


def examples(command: click.Command) -> list[str]:
    """Return the example lines of a command's help as a person would paste them."""
    lines = [
        line for block in (command.help or "").split("\b\n")[1:] for line in block.partition("\n\n")[0].splitlines()
    ]
    return [line.partition(" #")[0].strip() for line in lines if line.strip().startswith("insitu ")]


COMMANDS: Final = all_commands()
EXAMPLES: Final = list(dict.fromkeys(line for command in COMMANDS.values() for line in examples(command)))
SECOND: Final = frozenset(
    (
        "insitu demo",
        "insitu serve --stages 2 --port 0",
        "insitu serve --stages 2 --port 0 --to file://./insitu-store",
        "insitu sites gpt2",
        "insitu sites bert --json | python -m json.tool",
        "insitu plan gpt2 --rule 'L*.resid_post,requests=all,rows=last,cast=bf16'",
        "insitu plan gpt2 --rule '*,take=summary,every=64' --rule 'logits,topk=64,max_bytes_per_s=1MiB'",
    )
)
"""Examples of the commands that load torch and a model for seconds, beside one that says more."""
CHOSEN: Final = {next(line for line in examples(command) if line not in SECOND) for command in COMMANDS.values()}
"""An example of each command; the others are tried with the matrix."""


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_two_examples_of_its_own(name: str) -> None:
    found = examples(COMMANDS[name])
    assert len(found) >= 2, found
    assert all(line.startswith(name) for line in found)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that a probe in a small model wrote, with rows of a request `req-1`."""
    store = tmp_path_factory.mktemp("recorded") / "insitu-store"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    rule = insitu.Rule(sites="*", requests="all")
    with insitu.attach(net, to=f"file://{store}", rules=[rule]) as session, torch.inference_mode():
        for number in range(50):
            with session.step(rows=[insitu.Rows("req-1", start=0, count=4, position=4 * number)]):
                net(torch.randn(4, 8))
            assert session.flush().pending == 0
    return store


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a running `insitu serve`."""
    serve = Process(["-m", "insitu", "serve", "--port", "0"])
    try:
        yield serve.wait_for(r"ready on (http://[\w.:]+)")[1]
    finally:
        serve.stop()


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a collector, with a rank that steps."""
    store, is_over = tmp_path_factory.mktemp("collected") / "insitu-store", threading.Event()
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def step() -> None:
        with torch.inference_mode():
            while not is_over.wait(0.02):
                net(torch.randn(4, 8))

    with CollectorServer(store, port=0) as server, insitu.attach(net, to=server.address) as session:
        stepping = threading.Thread(target=step)
        stepping.start()
        while session.flush().durable == 0:
            pass
        yield server.address.removeprefix("grpc://")
        is_over.set()
        stepping.join()


@pytest.fixture(scope="module")
def without_pandas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with which there is none.

    Where there is one, pyarrow imports it at its first conversion: half of what a command takes that asks a store, and
    nothing comes of it.
    """
    folder = tmp_path_factory.mktemp("without_pandas")
    (folder / "pandas.py").write_text("raise ModuleNotFoundError(name='pandas')\n")
    return folder


class Pasted:
    """A line given to a shell in a folder, as a terminal would; Ctrl-C is given once it says that it is ready."""

    def __init__(self, line: str, folder: Path, more_modules: Path) -> None:
        variables = {name: value for name, value in os.environ.items() if not name.startswith("INSITU_")}
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
        variables["PYTHONPATH"] = os.pathsep.join([str(more_modules), *filter(None, [variables.get("PYTHONPATH")])])
        self.said: list[str] = []
        self.was_ready = False
        self._process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.said.append(line.rstrip())
            if not self.was_ready and READY.match(line):
                self.was_ready = True
                os.killpg(self._process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Return exit status and stdout."""
        assert self._process.stdout is not None
        watch = threading.Timer(WAIT_S, os.killpg, (self._process.pid, signal.SIGKILL))
        watch.start()
        with self._process.stdout as stdout:
            printed = stdout.read()
        self._reader.join()
        status = self._process.wait()
        watch.cancel()
        assert self._process.stderr is not None
        self._process.stderr.close()
        return status, printed


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a line."""

    status: int
    printed: str
    said: str
    was_ready: bool


def paste(line: str, folder: Path, recorded: Path, more_modules: Path) -> Outcome:
    shutil.copytree(recorded, folder / "insitu-store")
    append_entry(folder / "insitu-tokens.toml", Entry("somebody", frozenset({Role.SHIP}), san="somebody.example.com"))
    pasted = Pasted(line, folder, more_modules)
    status, printed = pasted.end()
    return Outcome(status, printed, "\n".join(pasted.said), pasted.was_ready)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, recorded: Path, without_pandas: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Outcome]]]:
    """The examples that were chosen, on their way: some at a time, since most of them mostly wait."""
    asked = {
        item.callspec.params.get("line")
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    chosen = [line for line in EXAMPLES if line in asked]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        running = {}
        for line in sorted(chosen, key=lambda line: not line.startswith("insitu demo")):  # the longest first
            there = line
            if SERVER in line:
                there = line.replace(SERVER, request.getfixturevalue("server"))
            if COLLECTOR in line:
                there = line.replace(COLLECTOR, request.getfixturevalue("collector"))
            running[line] = pool.submit(paste, there, tmp_path_factory.mktemp("pasted"), recorded, without_pandas)
        yield running


def test_examples_that_are_tried_with_the_matrix_are_examples() -> None:
    assert set(EXAMPLES) >= SECOND


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.matrix] * (line not in CHOSEN)) for line in EXAMPLES]
)
def test_an_example_works_when_pasted(line: str, outcomes: dict[str, Future[Outcome]]) -> None:
    found = outcomes[line].result()
    interrupted = {cli.ExitCode.INTERRUPTED} if found.was_ready and line.startswith("insitu demo") else set()
    assert found.status in {cli.ExitCode.OK, *interrupted}, f"{found.status}: {found.said}"
    assert "Traceback" not in found.said + found.printed
    assert found.printed.strip() or found.was_ready, "it said nothing at all"
    if "--json" in line:
        assert json.loads(found.printed)["schema"].startswith("insitu.")
