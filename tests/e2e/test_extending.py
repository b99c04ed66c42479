"""docs/extending.md: its packages install, keep their contracts and pass their own tests, and what it shows works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from insitu.plugins.discovery import EXPORTERS, GROUPS, SITES, STATISTICS, VERDICTS

pytestmark = pytest.mark.timeout(240)

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "examples/plugins"
PAGE: Final = (ROOT / "docs/extending.md").read_text()
BLOCKS: Final = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHIPPED: Final = {path: path.read_text() for path in sorted(EXAMPLES.glob("*/*")) if path.suffix in (".py", ".toml")}
PROGRAMS: Final = [
    text for kind, text in BLOCKS if kind == "python" and not any(text in own for own in SHIPPED.values())
]
SESSIONS: Final = [text.splitlines() for kind, text in BLOCKS if not kind]
NAMES: Final = {"acme.row_norm": STATISTICS, "jsonl": EXPORTERS, "acme-decoder": SITES, "slow-request": VERDICTS}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four packages in it, as pip installs them."""
    folder, sources = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("packages")
    packages = [str(shutil.copytree(EXAMPLES / name, sources / name)) for name in os.listdir(EXAMPLES)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder), *packages], check=True, timeout=110)
    return folder


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where the packages are installed."""
    path = os.pathsep.join([str(installed), *filter(None, sys.path)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("INSITU_", "PYTEST_"))}
    environment |= {"PYTHONPATH": path, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110, env=environment, cwd=cwd)


def test_all_are_found_and_keep_their_word(installed: Path, tmp_path: Path) -> None:
    ran = run(installed, tmp_path, sys.executable, "-m", "insitu", "plugins", "check", "--json")
    rows = json.loads(ran.stdout)["plugins"]
    assert {row["name"]: row["group"] for row in rows} == NAMES
    assert {row["state"] for row in rows} == {"ok"}, rows
    assert ran.returncode == 0


def test_their_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    ran = run(installed, ROOT, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^[8-9] passed|^\d\d passed", ran.stdout, re.MULTILINE), ran.stdout


def test_the_page_shows_a_package_of_each_group() -> None:
    assert all(f"`{group}`" in PAGE for group in GROUPS)
    shown = [text for kind, text in BLOCKS if kind in ("python", "toml") and text not in PROGRAMS]
    for folder in EXAMPLES.iterdir():
        mine = [text for path, text in SHIPPED.items() if path.parent == folder]
        assert any(block in own for block in shown for own in mine), f"nothing of {folder.name} is shown"
    for kind, text in BLOCKS:
        assert kind != "toml" or any(text in own for own in SHIPPED.values()), text


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda text: text.split("to=")[-1][1:8])
def test_what_the_page_shows_runs(program: str, installed: Path, tmp_path: Path) -> None:
    ran = run(installed, tmp_path, sys.executable, "-W", "error", "-c", program)
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
    assert ran.stdout.strip()


@pytest.mark.matrix  # the page's programs run above
@pytest.mark.parametrize("lines", SESSIONS, ids=lambda lines: lines[-1])
def test_its_commands_work_as_they_stand(lines: list[str], installed: Path, tmp_path: Path) -> None:
    for line in lines:
        if line.startswith("pip install "):  # the fixture has done it, without the network
            assert all((ROOT / path / "pyproject.toml").is_file() for path in line.split()[2:])
            continue
        ran = run(installed, tmp_path, "bash", "-c", line)
        assert ran.returncode == 0, f"{line}: {ran.stdout}{ran.stderr}"
        assert ran.stdout.strip() or "--once" in line
