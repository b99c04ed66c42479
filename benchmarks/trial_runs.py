"""How a trial is run: `insitu demo --json`, what others took of the cores meanwhile, and what its answer is worth."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from trial_plans import AS_IT_COMES, PLANS, Plan, World, plan_of
from trial_results import Trial
from trial_rules import QUIET, account_errors, faults_of, rule

from insitu.vocabulary import IntervalClass
from insitu_collector.store import open_store
from insitu_engine.demo_plan import default_model, num_layers

RUN_TIMEOUT_S: Final = 300.0
CALIBRATION_S: Final = 8.0
BUSY: Final = (IntervalClass.COMPUTE, IntervalClass.HOST, IntervalClass.SAMPLE, IntervalClass.GC)


@dataclass(frozen=True, slots=True)
class Answered:
    """What one run of the demo gave."""

    document: dict[str, Any] | None
    said: str
    foreign_share: float


def run_demo(store: Path, seed: int, plan: Plan = AS_IT_COMES) -> Answered:
    """Run the demo once, measuring what other processes took of the cores meanwhile."""
    injected = [word for spec in plan.specs or ["none"] for word in ("--inject", spec)]
    command = [sys.executable, "-m", "insitu", "demo", "--headless", "--json", "--seed", str(seed)]
    command += ["--seconds", str(plan.seconds), "--store", str(store), *injected]
    command += ["--serve", plan.serve, "--load", plan.load]
    busy_s, ours_s, began = _host_busy_s(), _children_s(), time.monotonic()
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Answered(None, f"no answer within {RUN_TIMEOUT_S:.0f} s", 0.0)
    foreign_s = (_host_busy_s() - busy_s) - (_children_s() - ours_s)
    share = max(0.0, foreign_s / (time.monotonic() - began) / (os.cpu_count() or 1))
    document = json.loads(ran.stdout) if ran.returncode == 0 else None
    return Answered(document, (ran.stderr.strip() or "?").splitlines()[-1], share)


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


def demo_once(kind: str, seed: int, world: World, folder: Path) -> Trial:
    """Run the demo once and judge what it said; its store is kept when that is not right."""
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
    ruling = rule(document, answered.foreign_share, kind)
    trial.wrong, trial.missed = ruling.wrong, ruling.missed + _first_told(store, document)
    trial.account = account_errors(document)
    trial.right = ruling.right and not trial.missed and not trial.account
    trial.faults = list(faults_of(document))
    if len(trial.faults) != len(trial.specs):
        trial.right = False
        trial.missed.append(f"{len(trial.specs)} faults were asked for and {len(trial.faults)} were done")
    trial.told = [f"{v['kind']}: {v['text']}" for v in document["verdicts"]]
    trial.start_to_ready_s = document["start_to_ready_s"]
    trial.fault_to_verdict_s = _delays_s(trial.faults, document["verdicts"])
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


def _delays_s(faults: Sequence[Any], verdicts: Sequence[Any]) -> list[float]:
    delays = []
    for fault in faults:
        after = [v["detected_unix_ns"] - fault["unix_ns"] for v in verdicts if v["rank"] == fault["rank"]]
        delays += [round(min(delay for delay in after if delay >= 0) / 1e9, 2)] if any(d >= 0 for d in after) else []
    return delays


Runner = Callable[[str, int, World, Path], Trial]
"""Runs and judges a trial once: its kind and seed, what it is drawn from, and the folder where it keeps things."""
RUNNERS: Final[Mapping[str, Runner]] = dict.fromkeys(PLANS, demo_once)
"""Kind of trial -> how it is run."""
