"""`insitu demo`: collector, judge, a two-stage engine and live traffic, each a process of its own, and one fault.

The demo starts `insitu ...` commands, reads what they print, and looks into the store as anybody could. The fault's
spec goes to the engine's environment and nowhere else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from insitu.cli import ExitCode, command_name
from insitu.config_show import load_for_command
from insitu.identity import current_run
from insitu_engine.demo_pages import DemoPages
from insitu_engine.demo_plan import (
    DEFAULT_FAULT,
    Plan,
    check_stages,
    default_model,
    fresh_store,
    num_layers,
    passed_on,
    resolve_specs,
)
from insitu_engine.demo_report import Reports, Setting, document, render, verdict_key
from insitu_engine.demo_watch import QUIET, VerdictWatch
from insitu_engine.inject import FAULTS_VARIABLE, LOG_VARIABLE
from insitu_engine.processes import Child, ChildFailed, Children, Interrupted

COLLECT_TIMEOUT_S: Final = 60.0
READY_TIMEOUT_S: Final = 180.0
STOP_S: Final = 20.0
"""How long a process may take to end in order before it is killed."""
LOOK_S: Final = 0.5
DEVICE: Final = "cpu"
"""What `insitu serve` runs on unless it is told otherwise."""
STALLS_TIMEOUT_S: Final = 120.0
NO_LOAD: Final[Mapping[str, Any]] = {"completed": 0, "failed": 0, "tokens_per_s": 0.0, "errors": {}}
"""What a load that was stopped before it could report had done."""
LONGEST_AGE_S: Final = 30.0
"""A command that seems to have been started longer ago than this has a kernel that counts otherwise."""


@dataclass(slots=True)
class Run:
    """What is known of a run once the engine was ready. Complete when `finish` has stopped everything."""

    plan: Plan
    began_unix_ns: int
    fault_log: Path
    watch: VerdictWatch
    pages: DemoPages | None = None
    """The dashboard, where somebody watches."""
    ready_unix_ns: int = 0
    interrupted: bool = False


@click.command()
@click.option("--headless", is_flag=True, help="No dashboard: nobody watches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@click.option("--seconds", type=click.FloatRange(min=1), default=30, show_default=True, help="Traffic, once ready.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes prompts, arrivals and a random fault.")
@click.option(
    "--inject",
    multiple=True,
    metavar="SPEC",
    help="slow-stage=STAGE:MS, nan=LAYER:STEP, gc=RANK, hang=RANK:STEP (each with @START[-END], seconds of "
    f"traffic), random or none; may be given again.  [default: {DEFAULT_FAULT}]",
)
@click.option("--store", type=click.Path(path_type=Path), help="[default: a new folder in ./insitu-store]")
@click.option("--stages", type=click.IntRange(min=1), default=2, show_default=True, help="Pipeline stages.")
@click.option("--model", type=click.Path(path_type=Path), help="[default: the tiny-llama that comes with insitu]")
@click.option("--serve", default="", metavar="OPTIONS", help="More options of `insitu serve`, like '--kv-mib 1'.")
@click.option("--load", default="", metavar="OPTIONS", help="More options of `insitu load`, like '--rate 8'.")
def demo(
    headless: bool,
    as_json: bool,
    seconds: float,
    seed: int,
    inject: tuple[str, ...],
    store: Path | None,
    stages: int,
    model: Path | None,
    serve: str,
    load: str,
) -> None:
    """Serve a real model on two stages under live traffic, slow one stage, and see the verdict name it.

    \b
    insitu demo
    insitu demo --json --seconds 60 --inject gc=0 --inject slow-stage=0:15@20-40
    """
    folder = model or default_model()
    layers = num_layers(folder)
    check_stages(stages, layers)
    specs = resolve_specs(inject or (DEFAULT_FAULT,), seed, stages, layers)
    more = {
        "serve_options": passed_on("--serve", serve, ("--model", "--stages", "--host", "--port", "--to")),
        "load_options": passed_on("--load", load, ("--url", "--seconds", "--seed", "--progress", "--quiet")),
    }
    store = store or fresh_store()  # last: it makes a folder
    plan = Plan(model=folder, num_stages=stages, store=store, seconds=seconds, seed=seed, specs=specs, **more)
    is_watched = not headless and not as_json
    interrupted = run_demo(
        plan,
        lambda answer: click.echo(json.dumps(answer) if as_json else render(answer, command_name())),
        DemoPages(say) if is_watched else None,
    )
    if interrupted:
        raise SystemExit(ExitCode.INTERRUPTED)


def run_demo(plan: Plan, tell: Callable[[dict[str, Any]], None], pages: DemoPages | None = None) -> bool:
    """Run the whole, tell its document; return whether somebody ended it early. Nothing it started is left.

    With `pages` a dashboard runs beside the traffic; in a terminal it stays after it, until Ctrl-C.
    Raises ClickException, one line.
    """
    current_run()  # the children inherit it: one run, whoever writes
    began_unix_ns = time.time_ns() - int(_age_s() * 1e9)
    with tempfile.TemporaryDirectory(prefix="insitu-demo-") as scratch:
        run = Run(plan, began_unix_ns, Path(scratch) / "faults.jsonl", VerdictWatch(plan.store, began_unix_ns), pages)
        children = Children()
        try:
            with children:
                load, sources = _serve_and_load(run, children)
                tell(_answer(run, load, sources))
                if pages is not None and not run.interrupted and sys.stdout.isatty():
                    pages.stay(children)
            return run.interrupted
        except ChildFailed as error:
            if children.interrupted.is_set():  # a terminal's Ctrl-C reaches whoever was reading the store
                _stop_saying(f"stopped before the answer was there{_kept(plan.store)}")
            raise click.ClickException(f"{error}{_kept(plan.store)}") from None
        except Interrupted:
            _stop_saying(f"stopped before the engine was ready{_kept(plan.store)}")
        except KeyboardInterrupt:  # everything has ended, and the store is being read
            _stop_saying(f"stopped before the answer was there{_kept(plan.store)}")
        finally:
            run.watch.close()


def _serve_and_load(run: Run, children: Children) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """Start everything, watch the traffic, stop everything; return what the load and all sessions reported."""
    plan = run.plan
    say(f"a collector with its judge, {plan.model.name} on {plan.num_stages} stages and a load, each a process here")
    say(f"collecting into {plan.store}, which keeps {load_for_command().keep}")
    collect = children.start("the collector", ["collect", "--store", str(plan.store), "--port", "0", "--judge"])
    address = collect.wait_for_line(r"collecting on (grpc://\S+)", COLLECT_TIMEOUT_S, children.interrupted)[1]
    say("starting the engine: it loads torch and the checkpoint, then warms up")
    serve = _start_engine(run, children, address)
    url = serve.wait_for_line(r"ready on (http://\S+)", READY_TIMEOUT_S, children.interrupted)[1].rstrip(",;.")
    run.ready_unix_ns = time.time_ns()
    say(
        f"ready after {start_to_ready_s(run):.1f} s; prompts arrive at random times for {plan.seconds:.0f} s, then it "
        "ends (Ctrl-C ends it at once)"
    )
    say(f"  what is injected, and only the engine knows it: {', '.join(plan.specs) or 'nothing'}")
    load: Child | None = None
    try:
        load = _start_load(plan, children, url)
        if run.pages is not None:
            run.pages.start(children, plan.store)
        _watch(run, children, load)
    except Interrupted:  # ready was said: from here on there is an answer, whatever there was time for
        run.interrupted = True
    say("stopping: the load, the engine, the collector with its judge")
    for child in filter(None, (load, serve, collect)):
        if not children.stop(child, STOP_S) and not run.interrupted:
            say(f"  {child.failure()}")
    _tell(run)
    answered = (load and json_line(load, "insitu.load/1")) or NO_LOAD
    for error, count in answered["errors"].items():
        say(f"  {count} request{'s' if count > 1 else ''} failed: {error}")
    return answered, [*sources_of(serve), *sources_of(collect)]


def _start_engine(run: Run, children: Children, address: str) -> Child:
    plan = run.plan
    arguments = ["serve", "--model", str(plan.model), "--stages", str(plan.num_stages), "--port", "0", "--to", address]
    arguments += plan.serve_options
    secret = {FAULTS_VARIABLE: json.dumps(plan.specs), LOG_VARIABLE: str(run.fault_log)} if plan.specs else {}
    return children.start("the engine", arguments, secret)


def _start_load(plan: Plan, children: Children, url: str) -> Child:
    arguments = ["load", "--url", url, "--seed", str(plan.seed), "--seconds", str(plan.seconds), "--progress"]
    prompts = plan.model / "prompts.txt"
    if prompts.exists():
        arguments += ["--prompts", str(prompts)]
    arguments += plan.load_options  # last: of two --prompts the second counts
    return children.start("the load", arguments, on_stderr=lambda line: say(f"  {line}"))


def _watch(run: Run, children: Children, load: Child) -> None:
    """Tell verdicts as they come until the traffic is over. Raises Interrupted or ChildFailed."""
    while not load.ended:
        children.check(load)
        _tell(run)
        children.interrupted.wait(LOOK_S)
    children.check(load)


def _tell(run: Run) -> None:
    now = time.time_ns()
    for row in run.watch.poll(now):
        if row["kind"] not in QUIET:
            say(f"verdict after {(now - run.ready_unix_ns) / 1e9:.1f} s of traffic: {row['text']}")


def _answer(run: Run, load: Mapping[str, Any], sources: list[Mapping[str, Any]]) -> dict[str, Any]:
    plan = run.plan
    seen = {
        verdict_key(s.row["kind"], s.row["on_stage"], s.row["on_rank"], s.row["detected_unix_ns"]): s.unix_ns
        for s in run.watch.first.values()
    }
    setting = Setting(
        seed=plan.seed,
        model=plan.model.resolve().name,
        num_stages=plan.num_stages,
        device=DEVICE,
        store=str(plan.store),
        start_to_ready_s=start_to_ready_s(run),
        ready_unix_ns=run.ready_unix_ns,
        first_seen_unix_ns=seen,
    )
    log = run.fault_log.read_text().splitlines() if run.fault_log.exists() else []
    faults = [json.loads(line) for line in log]
    return document(setting, Reports(load=load, sources=sources, stalls=read_stalls(plan.store), faults=faults))


def read_stalls(store: Path) -> dict[str, Any]:
    """Return what `insitu stalls STORE --json` says, which reads every segment again."""
    command = [sys.executable, "-P", "-m", "insitu", "stalls", str(store), "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=STALLS_TIMEOUT_S, check=False)
    try:
        found: dict[str, Any] = json.loads(ran.stdout)
    except ValueError:
        last = (ran.stderr.strip() or "it printed no document").splitlines()[-1]
        raise ChildFailed(f"insitu stalls ended with status {ran.returncode}: {last}") from None
    return found


def json_line(child: Child, schema: str) -> dict[str, Any] | None:
    """Return the last document of this schema that a child printed, if any."""
    for line in reversed(child.stdout):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            if found.get("schema") == schema:
                return found
    return None


def sources_of(child: Child) -> list[Mapping[str, Any]]:
    """Return the accounts of all sessions a child reported on its way out."""
    documents = (json.loads(line) for line in child.stdout if line.startswith("{"))
    return [source for document in documents for source in document.get("sources", ())]


def start_to_ready_s(run: Run) -> float:
    """Return seconds from the start of this command to a ready engine."""
    return (run.ready_unix_ns - run.began_unix_ns) / 1e9


def _age_s() -> float:
    """Return how long ago this process was started, as the kernel has it; 0 where it does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return age_s if 0 <= age_s < LONGEST_AGE_S else 0.0


def say(text: str) -> None:
    """Tell the person who watches; stdout is for the answer."""
    click.echo(text, err=True)


def _kept(store: Path) -> str:
    return f"; what was recorded is in {store}" if (store / "v1").exists() else ""


def _stop_saying(text: str) -> NoReturn:
    say(text)
    raise SystemExit(ExitCode.INTERRUPTED)
