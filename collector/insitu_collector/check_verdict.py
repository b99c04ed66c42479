"""What a verdict of another package promises, tried on simulated runs: it is pure, and what it finds can be stored.

`check_verdict` is for the tests of such a package too.
"""

from __future__ import annotations

import builtins
import io
import os
import pickle
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from threading import get_ident
from typing import Any, Final
from unittest.mock import patch

import pyarrow as pa

from insitu.plugins.discovery import Broken, Plugin
from insitu_collector.evidence import Evidence
from insitu_collector.plugins import Rule, storable
from insitu_collector.rows.slices import clock_with, seconds
from insitu_collector.simulate import Fault, Scenario, simulate
from insitu_collector.verdicts.finding import Finding

RUNS: Final = {
    "a healthy run": Scenario(seed=1, seconds=8.0),
    "a run with a slow stage": Scenario(seed=2, seconds=10.0, faults=(Fault("slow", 3.0, 1, ms=25.0),)),
    "a run that hangs": Scenario(seed=3, seconds=10.0, faults=(Fault("hang", 4.0, 1, ms=4000.0),)),
    "a run with a NaN": Scenario(seed=4, seconds=8.0, faults=(Fault("nan", 3.0, 1),)),
}
_OUTSIDE: Final = (
    (builtins, "open", "a file"),
    (io, "open", "a file"),
    (os, "open", "a file"),
    (socket.socket, "connect", "the network"),
    (socket, "getaddrinfo", "the network"),
    (subprocess.Popen, "__init__", "another program"),
)
"""What a verdict may not call."""


def check(plugin: Plugin, _: str | None) -> str:
    """Check an installed verdict: what `insitu plugins check` says."""
    return check_verdict(plugin.load())


def check_verdict(make: Callable[[], Rule]) -> str:
    """Return what held. Raises Broken, in a sentence, where it breaks a promise, and whatever it raises itself.

    make: what the entry point names. Each run is judged twice, the second time without files and network.
    """
    num_findings, took_ms = 0, list[float]()
    for what, scenario in RUNS.items():
        tables = simulate(scenario)
        first = _judged(make(), tables, what, took_ms)
        with _alone(what):
            again = _judged(make(), tables, what, took_ms)
        for before, after in zip(first, again, strict=True):
            if before != after:
                raise Broken(f"asked twice of one moment of {what} it found {after}, and before {before}")
        num_findings += len({finding.key for found in first for finding in found})
    looks = f"{len(took_ms)} looks at {len(RUNS)} simulated runs"
    return f"the same each time in {looks}, found {num_findings} things, {median(took_ms):.1f} ms a look"


def _judged(rule: Rule, tables: Mapping[str, pa.Table], what: str, took_ms: list[float]) -> list[list[Finding]]:
    """Return what a rule finds in a run, look by look, a second apart as a judge would."""
    evidence, told = Evidence(), list[list[Finding]]()
    for part in seconds(dict(tables), clock=clock_with(evidence, tables)):
        evidence.add(part)
        before = pickle.dumps(evidence)
        began = time.perf_counter()
        try:
            found = list(rule.look(evidence))
        except Broken:
            raise
        except Exception as error:
            raise Broken(f"in {what} it raised {type(error).__name__}: {error}") from error
        took_ms.append((time.perf_counter() - began) * 1e3)
        if pickle.dumps(evidence) != before:
            raise Broken(f"it changed the evidence of {what}")
        told.append([_stored(finding) for finding in found])
    return told


def _stored(finding: Finding) -> Finding:
    try:
        return storable(finding)
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise Broken(f"a finding of it cannot be stored: {error}") from None


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """Raise Broken where this thread asks anything but the evidence."""
    mine = get_ident()
    with ExitStack() as patches:
        for home, name, meaning in _OUTSIDE:
            real = getattr(home, name)

            def call(*args: Any, real: Any = real, meaning: str = meaning, **kwargs: Any) -> Any:
                if get_ident() == mine:
                    raise Broken(f"in {what} it asks {meaning}: a store that is judged later gives another answer")
                return real(*args, **kwargs)

            patches.enter_context(patch.object(home, name, call))
        yield
