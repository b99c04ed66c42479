"""`insitu demo` as a user runs it: one true document, nothing left behind, one line for every mistake."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from wait_kit import until

from insitu_collector.store import open_store
from insitu_engine.inject import FAULTS_VARIABLE, LOG_VARIABLE

pytestmark = pytest.mark.timeout(300)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/demo.json").read_text())
FAULT = "slow-stage=1:25@4.25"


@dataclass
class Demo:
    """A running `insitu demo` and every process of its run, found by the run they inherited."""

    store: Path
    arguments: list[str]
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "insitu", "demo", "--store", str(self.store), *self.arguments]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "INSITU_RUN": self.run},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def says(self, text: str) -> None:
        """Return when stderr has a line with `text`."""
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} was never said: {said}")

    def serves(self) -> None:
        """Return when it is in traffic and some of what it records is stored."""
        self.says("ready after")
        until(lambda: open_store(self.store).table("intervals").num_rows > 1000, "records of the traffic")

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of this run, the demo itself too."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("INSITU_RUN") == self.run and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return status, stdout and stderr. Fails when a process is left."""
        stdout, stderr = self.process.communicate(timeout=200)
        _, left = psutil.wait_procs(self.processes(), timeout=10)
        assert left == [], "no orphan"
        return self.process.returncode, stdout, stderr


@pytest.fixture
def demos(tmp_path: Path, model: Path) -> Iterator[list[Demo]]:
    """Hold what a test starts; nothing of it survives the test."""
    started: list[Demo] = []
    yield started
    for demo in started:
        for process in demo.processes():
            process.kill()
        demo.process.communicate()


def keys_of(value: Any) -> Any:
    """Return the shape of a document: its keys, and of each list its first element's."""
    if isinstance(value, dict):
        return {key: keys_of(item) for key, item in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) and value else None


def word_of(process: psutil.Process) -> str:
    """Return which `insitu` command a process runs."""
    words = process.cmdline()
    return next((word for word in words if word in ("demo", "collect", "judge", "serve", "load")), "")


@pytest.mark.matrix  # CI runs `make demo` itself, and looks at what it says
@pytest.mark.e2e  # a verdict is named, of a machine that nobody else uses
def test_the_document_is_true_and_the_spec_reaches_the_engine_alone(tmp_path: Path, demos: list[Demo]) -> None:
    demo = Demo(tmp_path / "store", ["--headless", "--json", "--seconds", "14", "--seed", "3", "--inject", FAULT])
    demos.append(demo)
    demo.says("5 s:")
    environments = {word_of(process): process.environ() for process in demo.processes()}
    assert {"collect", "judge", "serve", "load"} <= set(environments)
    knowing = {word for word, environ in environments.items() if {FAULTS_VARIABLE, LOG_VARIABLE} & set(environ)}
    assert knowing == {"serve"}
    status, stdout, _ = demo.end()
    assert status == 0
    answer = json.loads(stdout)
    assert stdout.count("\n") == 1, "one document and nothing else"
    shapes = {**keys_of(answer), "records": None}, {**keys_of(GOLDEN), "records": None}
    assert shapes[0] == shapes[1]
    first = answer["verdicts"][0]
    assert (first["kind"], first["stage"], first["rank"]) == ("stage_limits", 1, 1)
    assert first["text"].startswith("stage 1 limits the pipeline")
    assert first["num_requests"] > 0
    fault = answer["fault"]
    assert (fault["kind"], fault["stage"], fault["ms"]) == ("slow_stage", 1, 25)
    assert fault["unix_ns"] < first["detected_unix_ns"]
    assert answer["requests"] == {"completed": answer["requests"]["completed"], "failed": 0}
    assert answer["requests"]["completed"] > 20
    assert 0 < answer["ready_to_verdict_s"] < 20
    check_account(answer, demo.store)
    check_ledger(answer)
    check_secret(demo.store)


def check_account(answer: dict[str, Any], store: Path) -> None:
    """Produced is stored plus dropped, and stored is what anybody counts in the files."""
    kept = answer["records"]
    assert kept["produced"] == kept["stored"] + sum(kept["dropped"].values())
    opened = open_store(store)
    counted = {name: opened.table(name).num_rows for name in opened.tables()}
    assert {name: rows["stored"] for name, rows in kept["tables"].items()} == {k: n for k, n in counted.items() if n}
    assert kept["produced"] > 1000


def check_ledger(answer: dict[str, Any]) -> None:
    """Each rank's classes sum to the one window."""
    begin, end = answer["ledger_window_unix_ns"]
    for rank in (0, 1):
        seconds = sum(row["seconds"] for row in answer["ledger"] if row["rank"] == rank)
        assert seconds == pytest.approx((end - begin) / 1e9, abs=1e-6)


def check_secret(store: Path) -> None:
    """No byte of the store tells what was injected."""
    for file in store.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert b"slow-stage" not in content, file
            assert b"slow_stage" not in content, file
            assert FAULTS_VARIABLE.encode() not in content, file


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.matrix)])
def test_stopped_in_traffic_it_leaves_a_readable_store_and_nobody(
    tmp_path: Path, demos: list[Demo], number: signal.Signals
) -> None:
    demo = Demo(tmp_path / "store", ["--json", "--seconds", "120", "--inject", "none"])
    demos.append(demo)
    demo.serves()
    demo.process.send_signal(number)
    status, stdout, _ = demo.end()
    assert status == 130
    answer = json.loads(stdout)
    check_account(answer, demo.store)
    assert list((demo.store / "v1/open").rglob("*.arrow")) == [], "every segment is sealed"


def test_stopped_before_it_is_ready_it_says_so_and_leaves_nobody(tmp_path: Path, demos: list[Demo]) -> None:
    demo = Demo(tmp_path / "store", ["--json", "--seconds", "120"])
    demos.append(demo)
    demo.says("starting")
    demo.process.send_signal(signal.SIGINT)
    status, stdout, stderr = demo.end()
    assert (status, stdout) == (130, "")
    assert "stopped before the engine was ready" in stderr
    assert "Traceback" not in stderr


def test_an_engine_that_dies_is_named_and_takes_nobody_with_it(tmp_path: Path, demos: list[Demo]) -> None:
    demo = Demo(tmp_path / "store", ["--json", "--seconds", "120", "--inject", "none"])
    demos.append(demo)
    demo.serves()
    engine = min((p for p in demo.processes() if word_of(p) == "serve"), key=lambda process: process.create_time())
    engine.kill()
    status, stdout, stderr = demo.end()
    assert (status, stdout) == (1, "")
    assert stderr.splitlines()[-1].startswith("Error: the engine was killed by SIGKILL")
    assert "Traceback" not in stderr
    assert open_store(demo.store).table("intervals").num_rows > 100, "what was recorded stays"


def test_killed_outright_it_still_leaves_nobody_and_a_sealed_store(tmp_path: Path, demos: list[Demo]) -> None:
    demo = Demo(tmp_path / "store", ["--json", "--seconds", "120", "--inject", "none"])
    demos.append(demo)
    demo.serves()
    others = [process for process in demo.processes() if process.pid != demo.process.pid]
    demo.process.kill()
    _, left = psutil.wait_procs(others, timeout=60)
    assert left == []
    assert list((demo.store / "v1/open").rglob("*.arrow")) == []
    assert open_store(demo.store).table("intervals").num_rows > 100


def truncated(model: Path, folder: Path) -> Path:
    """Return a copy of the checkpoint whose weights end too early."""
    copy = folder / "cut"
    shutil.copytree(model, copy)
    weights = copy / "model.safetensors"
    weights.chmod(0o600)
    os.truncate(weights, weights.stat().st_size // 2)
    return copy


@pytest.mark.parametrize(
    "mistake", ["store", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("truncated", "architecture"))]
)
def test_a_mistake_is_one_line_and_nothing_is_left(
    tmp_path: Path, model: Path, demos: list[Demo], mistake: str
) -> None:
    store = tmp_path / "store"
    arguments, named = {
        "truncated": (["--model", str(truncated(model, tmp_path))], "cut"),
        "architecture": (["--model", str(foreign(model, tmp_path))], "foreign"),
        "store": ([], str(tmp_path / "file")),
    }[mistake]
    if mistake == "store":
        (tmp_path / "file").write_text("")
        store = tmp_path / "file/store"
    demo = Demo(store, ["--json", "--inject", "none", *arguments])
    demos.append(demo)
    began = time.monotonic()
    status, stdout, stderr = demo.end()
    assert (status, stdout) == (1, "")
    last = stderr.splitlines()[-1]
    assert last.startswith("Error: the ")
    assert named in last
    assert "Traceback" not in stderr
    assert time.monotonic() - began < 60


def foreign(model: Path, folder: Path) -> Path:
    """Return a copy of the checkpoint that says it is of an architecture the engine does not have."""
    copy = folder / "foreign"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "foreign", "architectures": ["ForeignForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy
