"""Verdict plug-ins: a real package is installed and judges; one that fails harms nothing but itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.plugins.discovery import VERDICTS, Plugin
from insitu.vocabulary import NAMESPACED, VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.judge.runs import Judge, final_verdicts
from insitu_collector.plugins import Plugins, storable
from insitu_collector.simulate import Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store
from insitu_collector.verdicts.finding import Finding, Verdict, standing

EXAMPLE = Path(__file__).parents[2] / "examples/plugins/verdict"
SLOW = Scenario(seed=3, seconds=12.0, faults=(Fault("slow", 5.0, 1, ms=12.0),))


class Sink:
    """Keeps what a session would ship."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {"verdicts": [], "events": []}

    def append(self, table: str, row: Mapping[str, Any]) -> None:
        self.rows[table].append(dict(row))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package in it, as pip installs it."""
    folder = tmp_path_factory.mktemp("site")
    package = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("package") / "verdict")  # a build writes beside it
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder), str(package)], check=True, timeout=110)
    assert list(folder.glob("acme_insitu-1.0.dist-info/entry_points.txt"))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(simulate(SLOW), str(tmp_path / "store"))
    return tmp_path / "store"


def insitu(folder: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path} | variables
    command = [sys.executable, "-m", "insitu", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def test_the_example_package_judges_once_it_is_installed(installed: Path, store: Path) -> None:
    ran = insitu(installed, "judge", str(store), "--once")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = final_verdicts(open_store(store))
    assert [v.kind for v in found] == [VerdictKind.STAGE_LIMITS, "acme.slow_request"]
    assert found[1].num_requests > 0
    assert "longer than the 1.5 s" in found[1].text
    said = insitu(installed, "stalls", str(store)).stdout
    assert found[1].text in said


def test_it_can_be_left_out(installed: Path, store: Path) -> None:
    insitu(installed, "judge", str(store), "--once", INSITU_PLUGINS_OFF="other, slow-request")
    assert [v.kind for v in final_verdicts(open_store(store))] == [VerdictKind.STAGE_LIMITS]


def test_a_store_that_was_never_judged_is_judged_with_it_too(installed: Path, store: Path) -> None:
    document = json.loads(insitu(installed, "stalls", str(store), "--json").stdout)
    assert [verdict["kind"] for verdict in document["verdicts"]] == ["stage_limits", "acme.slow_request"]


def test_plugins_are_listed_with_what_is_wrong(installed: Path, tmp_path: Path) -> None:
    ran = insitu(installed, "plugins", "list", "--json")
    row = {"name": "slow-request", "group": VERDICTS, "package": "acme-insitu", "version": "1.0"}
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["plugins"] == [row | {"on": True, "error": None}]
    off = json.loads(insitu(installed, "plugins", "list", "--json", INSITU_PLUGINS_OFF="slow-request").stdout)
    assert off["plugins"] == [row | {"on": False, "error": None}]
    broken = tmp_path / "broken-0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0\n")
    (broken / "entry_points.txt").write_text(f"[{VERDICTS}]\nno-such = no_such_module:Rule\n")
    ran = insitu(tmp_path, "plugins", "list")
    assert ran.returncode == 3
    assert "ModuleNotFoundError: No module named 'no_such_module'" in ran.stdout


PLUGIN = """
from insitu_collector.verdicts.finding import Finding

class Good:
    def look(self, evidence):
        yield Finding(kind="acme.good", text="good", remedy="", t0_ns=evidence.now_ns, t1_ns=evidence.now_ns)

class Raises:
    num_looks = 0

    def look(self, evidence):
        self.num_looks += 1
        yield Finding(kind="acme.raises", text="so far", remedy="", t0_ns=0, t1_ns=1)
        if self.num_looks == 3:
            raise ZeroDivisionError("by its own fault")

class Nameless:
    def look(self, evidence):
        return [Finding(kind="stuck", text="I am one of yours", remedy="", t0_ns=0, t1_ns=1)]

class CannotBeMade:
    def __init__(self):
        raise OSError("no licence")
"""


def plugins(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Plugins:
    (folder / "acme_test_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(folder))
    return Plugins([Plugin(EntryPoint(name, f"acme_test_plugin:{name}", VERDICTS)) for name in names])


@pytest.mark.usefixtures("insitu_contains")
def test_a_plugin_that_fails_is_switched_off_and_all_else_goes_on(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("Raises", "Nameless", "CannotBeMade", "Missing", "Good")
    sink = Sink()
    judge = Judge(open_store(store), sink, plugins(tmp_path, monkeypatch, *names))
    judge.look(live=False, final=True)
    judge.close()
    told = [Verdict.from_row(row) for row in sink.rows["verdicts"]]
    assert {(v.kind, v.state) for v in standing(told)} == {
        (VerdictKind.STAGE_LIMITS, "open"),
        ("acme.good", "open"),
        ("acme.raises", "open"),  # nobody can say whether it still holds
    }
    texts = [row["text"] for row in sink.rows["events"] if row["kind"] == "plugin_failed"]
    assert len(texts) == len([record for record in caplog.records if "plug-in" in record.message]) == 4
    for name, why in {
        "Raises": "ZeroDivisionError: by its own fault",
        "Nameless": "no namespace",
        "CannotBeMade": "OSError: no licence",
        "Missing": "AttributeError",
    }.items():
        (text,) = [text for text in texts if f"plug-in {name} " in text]
        assert why in text


def test_kinds_that_are_not_known_come_after_those_that_are() -> None:
    def verdict(kind: str) -> Verdict:
        row = dict.fromkeys(Verdict.__dataclass_fields__) | {"kind": kind, "verdict": kind, "revision": 0}
        return Verdict.from_row(row | {"state": "open", "window_start_unix_ns": 0, "window_end_unix_ns": 0})

    kinds = ["zeta.last", "clock_uncertain", "acme.thermal", "stuck", "healthy"]
    order = [v.kind for v in standing([verdict(kind) for kind in kinds])]
    assert order == ["stuck", "clock_uncertain", "acme.thermal", "zeta.last"]


def test_what_the_page_says_may_be_read_is_there() -> None:
    page = (EXAMPLE.parents[2] / "docs/extending.md").read_text()
    said = re.findall(r"`([a-z_]+)(?:\([^`]*)?`", page.partition("on one timeline:")[2].partition("They are added")[0])
    evidence = Evidence()
    assert len(said) > 10
    for name in said:
        assert hasattr(evidence, name) or hasattr(evidence.intervals, name), f"Evidence has no {name}"


values = st.none() | st.integers() | st.floats() | st.text() | st.lists(st.text())


@given(
    kind=st.from_regex(NAMESPACED, fullmatch=True) | st.sampled_from(["stuck", "a.", ".b", "A.b", "a.b\n"]),
    rank=values,
    site=values,
    confidence=st.floats(),
    t0=st.integers(0, 9),
    t1=st.integers(0, 9),
)
def test_what_passes_can_be_stored_and_sent(
    kind: str, rank: Any, site: Any, confidence: float, t0: int, t1: int
) -> None:
    finding = Finding(
        kind=kind, text="t", remedy="r", t0_ns=t0, t1_ns=t1, on_rank=rank, site=site, confidence=confidence
    )
    try:
        found = storable(finding)
    except (ValueError, TypeError, OverflowError):
        return
    assert "." in kind
    assert t0 <= t1
    assert 0 <= confidence <= 1
    assert found.on_rank is None or -(2**15) <= found.on_rank < 2**15
    assert found.site is None or type(found.site) is str


def test_numbers_of_numpy_become_plain_ones() -> None:
    finding = Finding(kind="a.b", text="", remedy="", t0_ns=np.int64(1), t1_ns=np.int64(2), on_rank=np.int64(3))  # type: ignore[arg-type]
    found = storable(finding)
    assert [type(value) for value in (found.t0_ns, found.t1_ns, found.on_rank)] == [int, int, int]
