"""`insitu doctor`: what this machine and environment can do, why that matters, and what to change.

Each check is a function that looks and returns one `Check`; nothing here needs more than the core dependencies, and
an absent extra is a warning, since the probe alone is a whole use of insitu.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import click

from insitu.cli import ExitCode
from insitu.config import Config, ConfigError, load
from insitu.credentials import NONE, CredentialError, Credentials
from insitu.destinations import scheme_of
from insitu.identity import boot_id, package_version
from insitu.setting_values import is_on
from insitu.settings_file import FILE

SCHEMA: Final = "insitu.doctor/1"
COLLECTOR_PORT: Final = 4317
MIN_FREE_BYTES: Final = 1 << 30
LOCAL_S: Final = 0.5
MAX_TICK_NS: Final = 1_000_000
"""Intervals are recorded to the nanosecond; a clock that moves in steps over a millisecond cannot tell them apart."""


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: its state, what was seen and why it matters, and what to do (empty when ok)."""

    check: str
    status: Status
    why: str
    fix: str = ""


def check_python(running: tuple[int, ...] = sys.version_info[:3]) -> Check:
    found = ".".join(map(str, running))
    if running < (3, 11):
        return Check("python", Status.PROBLEM, f"{found}; insitu needs 3.11", "make the environment with Python 3.11+")
    return Check("python", Status.OK, f"{found} ({platform.machine()})")


def check_package(name: str, oldest: str, extra: str | None, installed: Callable[[str], str] = version) -> Check:
    """Look a distribution up without importing it. `extra` names what brings it; None: it is a core dependency."""
    missing = Status.PROBLEM if extra is None else Status.WARN
    remedy = f"pip install 'insitu[{extra}]'" if extra else "pip install --force-reinstall insitu"
    try:
        found = installed(name)
    except PackageNotFoundError:
        lost = f"`insitu[{extra}]` is not installed" if extra else "a core dependency"
        return Check(name, missing, f"absent: {lost}", remedy)
    if _numbers(found) < _numbers(oldest):
        return Check(name, Status.PROBLEM, f"{found} is older than {oldest}", f"pip install '{name}>={oldest}'")
    return Check(name, Status.OK, found)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.partition("+")[0].split(".")
    return tuple(int(digits) for part in parts[:3] if (digits := "".join(c for c in part if c.isdigit())))


def check_taps(
    installed: Callable[[str], str] = version,
    device: Path = Path("/dev/nvidiactl"),
    environment: Mapping[str, str] = os.environ,
) -> Check:
    """Look at what the taps of an eager model will be. device: a file that is there where NVIDIA's driver is."""
    try:
        if not is_on(environment.get("INSITU_FUSED_TAPS", "1")):
            return Check("taps", Status.OK, "operations of torch (INSITU_FUSED_TAPS)")
    except ValueError as error:
        return Check("taps", Status.PROBLEM, f"INSITU_FUSED_TAPS: {error}", "unset INSITU_FUSED_TAPS")
    if not device.exists():
        return Check("taps", Status.OK, "operations of torch: no NVIDIA device here")
    try:
        found = installed("triton")
    except PackageNotFoundError:
        why = "operations of torch, two to seven launches a site: no Triton, which torch for CUDA brings along"
        return Check("taps", Status.WARN, why, "pip install triton")
    return Check("taps", Status.OK, f"one kernel a site on CUDA, by Triton {found}")


def check_fork(environment: Mapping[str, str]) -> Check:
    """Without gRPC's support for forks, channels of the program's own hang after one; with it, each takes long."""
    said, fix = environment.get("GRPC_ENABLE_FORK_SUPPORT", ""), "unset GRPC_ENABLE_FORK_SUPPORT"
    if said.lower() in ("0", "false"):
        why = f"GRPC_ENABLE_FORK_SUPPORT={said}: a process that forks after gRPC started can hang"
        return Check("fork", Status.PROBLEM, why, fix)
    if said.lower() in ("1", "true", "yes"):
        why = f"GRPC_ENABLE_FORK_SUPPORT={said}: gRPC makes each fork take 1.5 s; insitu does not need it"
        return Check("fork", Status.WARN, why, fix)
    return Check("fork", Status.OK, "no setting that makes gRPC hang in a forked child")


def check_writable(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"insitu")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        why = f"cannot write in {folder}: {error.strerror}"
        return Check("write", Status.PROBLEM, why, "change to a writable folder, or pass --store DIR")
    return Check("write", Status.OK, f"{folder} takes and syncs a file")


def check_space(folder: Path, free_bytes: int | None = None) -> Check:
    free = shutil.disk_usage(folder).free if free_bytes is None else free_bytes
    seen = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < MIN_FREE_BYTES:
        return Check("space", Status.WARN, f"{seen}; a store grows with traffic", "free some, or pass --store DIR")
    return Check("space", Status.OK, seen)


def check_port(port: int = COLLECTOR_PORT) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            why = f"127.0.0.1:{port} cannot be taken ({error.strerror}); `insitu collect` listens there by default"
            return Check("port", Status.WARN, why, f"insitu collect --port {port + 10}")
    return Check("port", Status.OK, f"127.0.0.1:{port} is free for `insitu collect`")


def check_clock(read_ns: Callable[[], int] = time.monotonic_ns) -> Check:
    stamps = [read_ns() for _ in range(2000)]
    steps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    if min(steps) < 0:
        return Check("clock", Status.PROBLEM, "CLOCK_MONOTONIC ran backwards", "fix the machine's clock source")
    tick_ns = min((step for step in steps if step > 0), default=MAX_TICK_NS + 1)
    if tick_ns > MAX_TICK_NS:
        why = f"CLOCK_MONOTONIC moves in steps of {tick_ns / 1e6:.1f} ms"
        return Check("clock", Status.WARN, why, "use a machine with a finer clock; verdicts here would be coarse")
    boot = boot_id()
    if boot.startswith("unknown"):
        why = "no boot id: processes of this host cannot be seen to share a clock"
        return Check("clock", Status.WARN, why, "make /proc/sys/kernel/random/boot_id readable")
    return Check("clock", Status.OK, f"moves in {tick_ns} ns, boot {boot[:8]}")


def check_cores(cores: int | None = None, load: float | None = None) -> Check:
    usable = len(os.sched_getaffinity(0)) if cores is None else cores
    busy = os.getloadavg()[0] if load is None else load
    seen = f"{usable} usable, load {busy:.1f}"
    if usable < 2:
        return Check("cores", Status.WARN, f"{seen}; two stages need two cores", "expect verdicts of a contended host")
    if busy > 0.75 * usable:
        return Check("cores", Status.WARN, f"{seen}: the host is busy", "stop other work before trusting a timing")
    return Check("cores", Status.OK, seen)


def check_settings(folder: Path) -> tuple[Check, Config | None]:
    """Look at variables and at the file of settings; return what is set, too, where that can be used."""
    try:
        config = load(folder)
    except ConfigError as error:
        why, _, remedy = str(error).partition("; ")
        return Check("settings", Status.PROBLEM, why, remedy or "insitu config show"), None
    if warnings := config.warnings():
        why, _, remedy = warnings[0].partition("; ")
        return Check("settings", Status.WARN, why, remedy), config
    return Check("settings", Status.OK, str(config.file or f"no {FILE}; variables and defaults")), config


def check_credentials(credentials: Credentials) -> Check:
    """Look at what collectors are shown: which files are set, and whether they can be read. Never what is in them."""
    try:
        credentials.check()
    except CredentialError as error:
        why, _, remedy = str(error).partition("; ")
        return Check("credentials", Status.PROBLEM, why, remedy or "insitu config show")
    if not credentials.named:
        return Check("credentials", Status.OK, "none set: a collector with --tokens or --tls-client-ca asks for some")
    return _secret(credentials) or Check("credentials", Status.OK, f"set and readable: {', '.join(credentials.named)}")


def _secret(credentials: Credentials) -> Check | None:
    """Return what is wrong where others may read a secret."""
    for name in ("token_file", "client_key"):
        path = getattr(credentials, name)
        if path is not None and Path(path).stat().st_mode & 0o077:
            why = f"{name} {path} may be read by others than its owner"
            return Check("credentials", Status.WARN, why, f"chmod 600 {path}")
    return None


def collector_address(asked: str | None, to: Any) -> str | None:
    """Return the URL of the collector to ask: the one that is named, that of `to`, or one on the usual port.

    None: there is none of these.
    """
    named = asked if asked is not None else to
    if isinstance(named, str) and (asked is not None or scheme_of(named) in ("grpc", "grpcs")):
        return named if "://" in named else f"grpc://{named}"
    with socket.socket() as probe:
        probe.settimeout(LOCAL_S)
        is_there = probe.connect_ex(("127.0.0.1", COLLECTOR_PORT)) == 0
    return f"grpc://127.0.0.1:{COLLECTOR_PORT}" if is_there else None


def run_checks(folder: Path, collector: str | None = None) -> list[Check]:
    """Look at everything, in the order a reader wants it. collector: URL of the one to ask; None: the usual one."""
    settings, config = check_settings(folder)
    address = collector_address(collector, config and config.to)
    credentials = NONE if config is None else config.credentials
    packages = (
        ("pyarrow", "23.0.1", None),
        ("grpcio", "1.81", None),
        ("protobuf", "6.33.5", None),
        ("torch", "2.8", "engine"),
        ("transformers", "5.20", "engine"),
        ("duckdb", "1.3", "collector"),
    )
    checks = [
        check_python(),
        *(check_package(*package) for package in packages),
        check_taps(),
        check_fork(os.environ),
        check_writable(folder),
        check_space(folder),
        check_port() if address is None else None,
        settings,
        check_credentials(credentials) if config is not None else None,
        check_clock(),
        check_cores(),
        *_asked(address, credentials),
    ]
    return [check for check in checks if check is not None]


def _asked(address: str | None, credentials: Credentials) -> list[Check]:
    if address is None:
        return []
    from insitu.collector_checks import collector_checks

    return collector_checks(address, credentials)


def next_command(checks: list[Check]) -> str:
    """Return the command to run next: what the worst check says, else the front door."""
    for check in checks:
        if check.status is Status.PROBLEM:
            return check.fix
    absent = {check.check for check in checks if check.status is Status.WARN}
    return "pip install 'insitu[all]'" if absent & {"torch", "transformers", "duckdb"} else "insitu demo"


def document(checks: list[Check]) -> dict[str, Any]:
    """Return what `--json` prints."""
    num_problems = sum(check.status is Status.PROBLEM for check in checks)
    return {
        "schema": SCHEMA,
        "version": package_version(),
        "num_problems": num_problems,
        "checks": [asdict(check) for check in checks],
        "next": next_command(checks),
    }


def table(checks: list[Check]) -> str:
    """Return the checks as aligned lines: check, status, why, and the fix below where there is one."""
    lines = []
    for check in checks:
        lines.append(f"{check.check:<17} {check.status:<8} {check.why}")
        if check.fix:
            lines.append(f"{'':<26} -> {check.fix}")
    return "\n".join(lines)


@click.command()
@click.option("--collector", metavar="URL", help="Ask this one too.  [default: that of `to`, or a local one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
def doctor(collector: str | None, as_json: bool) -> None:
    """Check this machine and environment, and a collector, and say what to fix. Exits with 3 when there is a problem.

    \b
    insitu doctor
    insitu doctor --json | python -m json.tool
    insitu doctor --collector 127.0.0.1:4317
    """
    checks = run_checks(Path.cwd(), collector)
    report = document(checks)
    click.echo(json.dumps(report, indent=2) if as_json else f"{table(checks)}\n\nnext: {report['next']}")
    if report["num_problems"]:
        raise SystemExit(ExitCode.PROBLEMS_FOUND)
