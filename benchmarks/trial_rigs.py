"""Two-rank trials: real ranks outside the demo, for verdicts that the demo's engine gives no cause for.

Starts `insitu collect --judge` (or `insitu judge`, where the ranks write the store themselves) and two ranks of a
script with what was drawn (`rig_plans.py`), stops all, and rules what `insitu stalls --json` says by what was done.

A second host is one by its clock and boot id: the rank runs in a time namespace, with another file bound over the
kernel's boot id.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from foreign import Foreign
from rig_plans import EXPECTED, NEED_NAMESPACES, TENSOR, Rig, draw_rig, row_errors, rule_rig
from trial_plans import World
from trial_results import Trial

from insitu_engine.processes import Child, ChildFailed, Children, Interrupted

ROOT: Final = Path(__file__).resolve().parents[1]
READY_S: Final = 60.0
RANKS_S: Final = 120.0
"""How long ranks may take: about 20 s are usual, most of it imports."""
STOP_S: Final = 20.0
PARTIAL: Final = 5
"""What `insitu stalls` exits with where rows are missing."""
ON_ANOTHER_HOST: Final = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'


def can_be_another_host() -> bool:
    """Tell whether this process may make time and mount namespaces, and bind a file over the boot id in one."""
    with tempfile.NamedTemporaryFile("w") as boot:
        command = [*_another_host(Path(boot.name), 1), "true"]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False


def _another_host(boot: Path, ahead_s: int) -> list[str]:
    """Return what a command is to be put behind to run on a host with that boot id and clock."""
    names = ["unshare", "--mount", "--time", "--monotonic", str(ahead_s), "--fork", "--kill-child"]
    return [*names, "sh", "-c", ON_ANOTHER_HOST, str(boot)]


def commands(rig: Rig, folder: Path, to: str) -> list[list[str]]:
    """Return the command of each rank; of a tensor-parallel pair one, which starts both."""
    program = [sys.executable, str(ROOT / rig.program), *rig.options, "--to", to]
    if rig.program == TENSOR:
        return [program]
    cue = ["--cue", str(folder / "cue")] if rig.stop_s else []
    ranks = [
        [*program, *rig.own[rank], *cue, "--rank", str(rank), "--meeting", str(folder / "meeting")] for rank in (0, 1)
    ]
    if rig.ahead_s is not None:
        boot = folder / "boot_id"
        boot.write_text(f"{uuid.UUID(int=random.Random(rig.ahead_s).getrandbits(128))}\n")
        ranks[1] = [*_another_host(boot, rig.ahead_s), *ranks[1]]
    return ranks


def rig_once(kind: str, seed: int, _world: World | None, folder: Path) -> Trial:
    """Run and judge one trial; what it recorded is kept when it is not right. Raises Interrupted."""
    rig, mine = draw_rig(kind, seed), folder / f"{kind}-{seed}"
    trial = Trial(kind, seed, [rig.did])
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True)
    try:
        with Foreign() as foreign:
            accounts, document = _record(rig, mine)
    except ChildFailed as error:
        trial.failure = str(error)
        return trial
    trial.foreign_share = round(foreign.share, 3)
    _judge(trial, rig, accounts, document)
    if trial.right:
        shutil.rmtree(mine)
    return trial


def _judge(trial: Trial, rig: Rig, accounts: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> None:
    share = next((account["share"] for account in accounts if account.get("share") is not None), None)
    ruling = rule_rig(rig, document["verdicts"], trial.foreign_share, share, revised=document["revised"])
    trial.wrong, trial.missed = ruling.wrong, ruling.missed
    trial.told = [f"{verdict['kind']}: {verdict['text']}" for verdict in document["verdicts"]]
    if rig.program != TENSOR:  # that one is an example, and gives no account
        sources = [source for account in accounts for source in account["sources"]]
        trial.account = row_errors(rig, sources, document["records"]["stored"])
    trial.right = ruling.right and not trial.account


def _record(rig: Rig, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the whole once; return what each process accounts for, and what the store says. Raises ChildFailed."""
    store, run = folder / "store", {"INSITU_RUN": f"{random.getrandbits(64):016x}"}
    with Children() as children:
        if rig.by_file:
            (store / "v1").mkdir(parents=True)  # so that there is something to follow
            collect = children.start("insitu judge", ["judge", str(store)], run)
            collect.wait_for_line("judging", READY_S, children.interrupted)
            to = f"file://{store}"
        else:
            options = ["--store", str(store), "--port", "0", "--judge"]
            collect = children.start("insitu collect", ["collect", *options], run)
            to = collect.wait_for_line(r"collecting on (grpc://\S+)", READY_S, children.interrupted)[1]
        said = _run_ranks(rig, folder, run, to, children, collect)
        if not children.stop(collect, STOP_S):
            raise collect.failure()
    lines = [*said, *collect.stdout]
    stalls = [sys.executable, "-P", "-m", "insitu", "stalls", str(store), "--json"]
    answered = subprocess.run(stalls, capture_output=True, text=True, check=False)
    if answered.returncode not in (0, PARTIAL):
        raise ChildFailed(f"insitu stalls ended with status {answered.returncode}: {answered.stderr[-500:]}")
    return [json.loads(line) for line in lines if line.startswith("{")], json.loads(answered.stdout)


def _run_ranks(rig: Rig, folder: Path, run: dict[str, str], to: str, children: Children, collect: Child) -> list[str]:
    """Run the ranks to their end; return what they printed. Raises ChildFailed, Interrupted."""
    with ExitStack() as stack:
        ranks = []
        for number, command in enumerate(commands(rig, folder, to)):
            room = {"INSITU_MAX_ROWS": str(rig.max_rows)} if rig.max_rows and number == rig.rank else {}
            ranks.append(stack.enter_context(_running(command, run | room, folder / f"rank-{number}.log")))
        if rig.stop_s:
            _wait_for(lambda: (folder / "cue").exists(), ranks, children)
            collect.signal(signal.SIGSTOP)
            children.interrupted.wait(rig.stop_s)
            collect.signal(signal.SIGCONT)
        _wait_for(lambda: all(rank.poll() is not None for rank in ranks), ranks, children)
        lines = []
        for number, rank in enumerate(ranks):
            assert rank.stdout is not None, "it is a pipe"
            lines += rank.stdout.read().splitlines()
            if rank.returncode:
                log = (folder / f"rank-{number}.log").read_text().strip().splitlines()
                raise ChildFailed(f"rank {number} ended with status {rank.returncode}: {log[-1] if log else '?'}")
    return lines


@contextmanager
def _running(command: Sequence[str], variables: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own for as long as the block lasts; its stderr goes to a file."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("INSITU_")}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            env=clean | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(is_so: Callable[[], bool], ranks: Sequence[subprocess.Popen[str]], children: Children) -> None:
    """Return once it is so. Raises ChildFailed when a rank fails before or it takes too long, and Interrupted."""
    deadline = time.monotonic() + RANKS_S
    while not is_so():
        if children.interrupted.wait(0.05):
            raise Interrupted
        children.check()
        if any(rank.poll() for rank in ranks):
            return  # the caller says of which and why
        if time.monotonic() > deadline:
            raise ChildFailed(f"the ranks took longer than {RANKS_S:.0f} s")


RIGS: Final[Mapping[str, Callable[[str, int, World | None, Path], Trial]]] = dict.fromkeys(EXPECTED, rig_once)
"""Kind of trial -> how it is run."""


def left_out(kinds: Sequence[str]) -> list[str]:
    """Return those of the kinds that cannot be run here: a second host takes CAP_SYS_ADMIN."""
    wanting = [kind for kind in kinds if kind in NEED_NAMESPACES]
    return wanting if wanting and not can_be_another_host() else []
