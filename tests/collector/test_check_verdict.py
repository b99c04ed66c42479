"""The kit for verdicts lets a pure one pass, and each kind of wrong one is told what is wrong with it."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from insitu.plugins.discovery import Broken
from insitu_collector import check_verdict as kit
from insitu_collector.check_verdict import check_verdict
from insitu_collector.evidence import Evidence
from insitu_collector.simulate import Fault, Scenario
from insitu_collector.verdicts.finding import Finding


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short run is as good as four, to see what is wrong."""
    slow = Scenario(seed=2, seconds=3.0, warmup_steps=20, faults=(Fault("slow", 1.0, 1, ms=12.0),))
    monkeypatch.setattr(kit, "RUNS", {"a short run": slow})


def finding(evidence: Evidence, text: str = "so it is", kind: str = "acme.found") -> Finding:
    return Finding(kind=kind, text=text, remedy="", t0_ns=evidence.now_ns, t1_ns=evidence.now_ns)


class Counts:
    """Right: remembers how often it looked, and opens what it likes before anybody looks."""

    def __init__(self) -> None:
        self.num_looks = 0

    def look(self, evidence: Evidence) -> Iterable[Finding]:
        self.num_looks += 1
        if evidence.num_traffic_steps:
            yield finding(evidence, f"look {self.num_looks}, {len(evidence.intervals.between(0)['t'])} intervals")


def test_a_pure_one_passes() -> None:
    told = check_verdict(Counts)
    assert told.startswith("the same each time in ")
    assert "found 1 things" in told


class Clock:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        return [finding(evidence, f"at {time.time_ns()}")]


class Reads:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        return [finding(evidence, Path("/proc/loadavg").read_text())]


class Asks:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        with socket.socket() as sock:
            sock.connect(("127.0.0.1", 9))
        return []


class Starts:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        subprocess.run(["true"], check=True)
        return []


class Writes:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        evidence.stages[7] = 7
        return []


class WritesArrays:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        for chunk in evidence.intervals._chunks:
            chunk["t0"] += 1
        return []


class Raises:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        raise ZeroDivisionError("by its own fault")


class Ours:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        return [finding(evidence, kind="stuck")]


class Text:
    def look(self, evidence: Evidence) -> Iterable[Finding]:
        return ["so it is"]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Clock, "asked twice of one moment of a short run"),
        (Reads, "in a short run it asks a file"),
        (Starts, "it asks another program"),
        (Writes, "changed the evidence of a short run"),
        (WritesArrays, "changed the evidence"),
        (Raises, "in a short run it raised ZeroDivisionError: by its own fault"),
        (Ours, "cannot be stored: the kind 'stuck' has no namespace"),
        (Text, "cannot be stored: 'so it is' is no"),
    ],
)
def test_a_wrong_one_is_told_what_is_wrong(make: type, message: str) -> None:
    with pytest.raises(Broken, match=message):
        check_verdict(make)


def test_the_network_is_out_of_reach() -> None:
    class Listens(Asks):
        def look(self, evidence: Evidence) -> Iterable[Finding]:
            try:
                return super().look(evidence)
            except ConnectionError:  # nobody listens on that port
                return []

    with pytest.raises(Broken, match="it asks the network"):
        check_verdict(Listens)


def test_afterwards_files_are_what_they_were(tmp_path: Path) -> None:
    check_verdict(Counts)
    (tmp_path / "file").write_text("text")
    assert (tmp_path / "file").read_text() == "text"
    subprocess.run(["true"], check=True)
