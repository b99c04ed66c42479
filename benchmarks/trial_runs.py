"""How a trial is run: `insitu demo --json`, what others took of the cores meanwhile, and what its answer is worth."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from trial_plans import AS_IT_COMES, PLANS, Burners, Plan, World, plan_of
from trial_results import Trial
from trial_rigs import RIGS
from trial_rules import EXPECTED, QUIET, account_errors, faults_of, rule

from insitu.vocabulary import IntervalClass
from insitu_collector.store import open_store
from insitu_engine.demo_plan import default_model, num_layers

RUN_TIMEOUT_S: Final = 300.0
CALIBRATION_S: Final = 8.0
READY: Final = "ready after"
"""How the line begins with which the demo says that traffic starts."""
BURN: Final = """
import sys, time
start_s, end_s = map(float, sys.argv[1:])
began = time.monotonic()
time.sleep(start_s)
while time.monotonic() < began + end_s:
    pass
"""
"""A process that uses a core between two times."""
BUSY: Final = (IntervalClass.COMPUTE, IntervalClass.HOST, IntervalClass.SAMPLE, IntervalClass.GC)


@dataclass(frozen=True, slots=True)
class Answered:
    """What one run of the demo gave."""

    document: dict[str, Any] | None
    said: str
    foreign_share: float
    """Share of all cores that neither the demo nor the burners used."""
    burnt: tuple[Mapping[str, Any], ...] = ()
    """When the burners burnt, as the injector would say it."""


def run_demo(store: Path, seed: int, plan: Plan = AS_IT_COMES) -> Answered:
    """Run the demo once, measuring what other processes took of the cores meanwhile."""
    injected = [word for spec in plan.specs or ["none"] for word in ("--inject", spec)]
    command = [sys.executable, "-m", "insitu", "demo", "--headless", "--json", "--seed", str(seed)]
    command += ["--seconds", str(plan.seconds), "--store", str(store), *injected]
    command += ["--serve", plan.serve, "--load", plan.load]
    busy_s, ours_s, began = _host_busy_s(), _children_s(), time.monotonic()
    with tempfile.TemporaryFile("w+") as stdout:
        with subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as demo:
            said, burnt = _attend(demo, plan.burners)
        stdout.seek(0)
        document = json.load(stdout) if demo.returncode == 0 else None
    foreign_s = (_host_busy_s() - busy_s) - (_children_s() - ours_s)
    share = max(0.0, foreign_s / (time.monotonic() - began) / (os.cpu_count() or 1))
    return Answered(document, said, share, burnt)


def _attend(demo: subprocess.Popen[str], burners: Burners | None) -> tuple[str, tuple[Mapping[str, Any], ...]]:
    """Let burners burn beside the demo's traffic; return the demo's last words and when they burnt."""
    said = "?"
    burnt: tuple[Mapping[str, Any], ...] = ()
    with ExitStack() as stack:
        watchdog = threading.Timer(RUN_TIMEOUT_S, demo.terminate)
        stack.callback(watchdog.cancel)
        watchdog.start()
        assert demo.stderr is not None, "its stderr is a pipe"
        for line in demo.stderr:
            said = line.strip() or said
            if line.startswith(READY) and burners is not None:
                burnt = (stack.enter_context(burning(burners)),)
        demo.wait()
    return said, burnt


@contextmanager
def burning(burners: Burners) -> Iterator[Mapping[str, Any]]:
    """Run processes that use the cores between two times from now; they end by themselves, or with the context."""
    now_ns = time.time_ns()
    times = str(burners.start_s), str(burners.end_s)
    running = [subprocess.Popen([sys.executable, "-S", "-E", "-c", BURN, *times]) for _ in range(burners.number)]
    try:
        yield {
            "kind": "burners",
            "stage": None,
            "rank": None,
            "number": burners.number,
            "unix_ns": now_ns + int(burners.start_s * 1e9),
            "end_unix_ns": now_ns + int(burners.end_s * 1e9),
        }
    finally:
        for process in running:
            process.kill()
            process.wait()


def _host_busy_s() -> float:
    """Return the CPU seconds of all cores since boot: everything but idle, waiting for disks, and stolen."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(words[place]) for place in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def calibrate(folder: Path) -> World:
    """Return the world of the trials, from one run without a fault."""
    store = folder / "calibration"
    answered = run_demo(store, seed=0, plan=Plan(seconds=CALIBRATION_S))
    if answered.document is None:
        raise click.ClickException(f"the run without a fault gave no answer: {answered.said}")
    num_stages = int(answered.document["stages"])
    stage_ms = tuple(round(_busy_ms(store, stage), 2) for stage in range(num_stages))
    shutil.rmtree(store)
    return World(num_stages, num_layers(default_model()), stage_ms)


def world_of(kinds: Sequence[str], known: World | None, folder: Path) -> World | None:
    """Return what trials of the demo are drawn from, measured now if it is not known; None where none is asked for."""
    if known is not None or PLANS.keys().isdisjoint(kinds):
        return known
    return calibrate(folder)


def _busy_ms(store: Path, stage: int) -> float:
    """Return a stage's median busy time a step (compute, host, sample, gc): of its core, so that others cannot add."""
    rows = open_store(store).table("intervals").to_pylist()
    steps: dict[int, int] = {}
    for row in rows:
        if row["stage"] == stage and row["step_id"] >= 0 and row["cls"] in BUSY:
            steps[row["step_id"]] = steps.get(row["step_id"], 0) + row["cpu_ns"]
    if not steps:
        raise click.ClickException(f"stage {stage} ran no step in the run without a fault")
    return float(np.median(list(steps.values()))) / 1e6


def long_prompts(folder: Path) -> Path:
    """Return a file of prompts, every third of them made of many: beside it others decode."""
    path = folder / "long-prompts.txt"
    if not path.exists():
        lines = (default_model() / "prompts.txt").read_text(encoding="utf-8").splitlines()
        made = [" ".join(lines[n : n + 10]) if n % 3 == 0 else lines[n] for n in range(0, len(lines) - 10, 3)]
        path.write_text("\n".join(made) + "\n", encoding="utf-8")
    return path


def demo_once(kind: str, seed: int, world: World | None, folder: Path) -> Trial:
    """Run the demo once and judge what it said; its store is kept when that is not right."""
    assert world is not None, "what a demo is to do is drawn from a run without a fault"
    plan = plan_of(kind, seed, world)
    trial = Trial(kind, seed, list(plan.specs))
    store = folder / f"{kind}-{seed}"
    shutil.rmtree(store, ignore_errors=True)
    if plan.long_prompts:
        plan = replace(plan, load=f"{plan.load} --prompts {long_prompts(folder)}")
    answered = run_demo(store, seed, plan)
    trial.foreign_share = round(answered.foreign_share, 3)
    document = answered.document
    if document is None:
        trial.failure = answered.said
        return trial
    trial.faults = [*faults_of(document), *answered.burnt]
    ruling = rule(document, answered.foreign_share, kind, trial.faults)
    trial.wrong, trial.missed = ruling.wrong, ruling.missed + _first_told(store, document)
    trial.account = account_errors(document)
    trial.right = ruling.right and not trial.missed and not trial.account
    if len(faults_of(document)) != len(plan.specs):
        trial.right = False
        trial.missed.append(f"{len(trial.specs)} faults were asked for and {len(faults_of(document))} were done")
    trial.told = [f"{v['kind']}: {v['text']}" for v in document["verdicts"]]
    trial.start_to_ready_s = document["start_to_ready_s"]
    trial.fault_to_verdict_s = _delays_s(kind, trial.faults, document["verdicts"])
    if trial.right:
        shutil.rmtree(store)
    return trial


def _first_told(store: Path, document: dict[str, Any]) -> list[str]:
    """Return what is wrong with the first alarm of the store: it must stand at the end, about the same place."""
    rows = [row for row in open_store(store).table("verdicts").to_pylist() if row["kind"] not in QUIET]
    if not rows:
        return []
    first = min(rows, key=lambda row: (row["detected_unix_ns"], row["revision"]))
    key = first["kind"], first["on_stage"], first["on_rank"], first["layer"]
    stands = {(v["kind"], v["stage"], v["rank"], v["layer"]) for v in document["verdicts"]}
    return [] if key in stands else [f"the first verdict does not stand at the end: {first['text']}"]


def _delays_s(kind: str, faults: Sequence[Any], verdicts: Sequence[Any]) -> list[float]:
    """Return how long after each fault the first verdict came that is its own: of its rank, or the kind's expected."""
    delays = []
    for fault in faults:
        own = [v for v in verdicts if (v["kind"] == EXPECTED[kind] if kind in EXPECTED else v["rank"] == fault["rank"])]
        after = [delay for v in own if (delay := v["detected_unix_ns"] - fault["unix_ns"]) >= 0]
        delays += [round(min(after) / 1e9, 2)] if after else []
    return delays


Runner = Callable[[str, int, World | None, Path], Trial]
"""Runs and judges a trial once: its kind and seed, what demos are drawn from, and the folder where it keeps things."""
RUNNERS: Final[Mapping[str, Runner]] = {**dict.fromkeys(PLANS, demo_once), **RIGS}
"""Kind of trial -> how it is run."""
