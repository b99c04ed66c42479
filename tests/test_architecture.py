"""The frame holds: who may import whom, what `import insitu` costs, fresh stubs, a page that names every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "insitu": ROOT / "probe/insitu",
    "insitu_engine": ROOT / "engine/insitu_engine",
    "insitu_collector": ROOT / "collector/insitu_collector",
    "insitu_dashboard": ROOT / "dashboard/insitu_dashboard",
}
ARROWS: dict[str, set[str]] = {
    "insitu": set(),
    "insitu_engine": {"insitu"},
    "insitu_collector": {"insitu"},
    "insitu_dashboard": {"insitu", "insitu_collector"},
}
WITHOUT_TORCH = ("insitu_collector", "insitu_dashboard")


def imports_of(file: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, at any depth of it."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None, "an absolute import names its module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


@pytest.mark.parametrize("package", list(PACKAGES))
def test_arrows_point_one_way(package: str) -> None:
    others = set(PACKAGES) - ARROWS[package] - {package}
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files_of(package)
        for name in imports_of(file)
        if name.partition(".")[0] in others
    ]
    assert wrong == []


def test_the_arrow_check_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from insitu_engine import serve\n    import insitu_collector.store as s\n")
    assert list(imports_of(file)) == ["insitu_engine.serve", "insitu_collector.store"]


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_who_collects_and_looks_needs_no_torch(package: str) -> None:
    modules = [
        ".".join((package, *file.relative_to(PACKAGES[package]).with_suffix("").parts)).removesuffix(".__init__")
        for file in files_of(package)
    ]
    script = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    assert "torch" not in loaded_by(script)


def test_importing_insitu_is_light() -> None:
    loaded = loaded_by("import insitu")
    assert "insitu" in loaded
    assert not loaded & {"torch", "pyarrow", "grpc", "numpy", "transformers", "opentelemetry"}


def test_what_is_needed_is_imported_before_the_model_steps(tmp_path: Path) -> None:
    script = f"""
import insitu, torch
model = torch.nn.Linear(4, 4)
session = insitu.attach(model, to="file://{tmp_path}/store")
before = set(sys.modules)
with torch.inference_mode():
    [model(torch.ones(1, 4)) for _ in range(20)]
assert session.flush().durable > 0
late = set(sys.modules) - before
session.close()
assert not late, sorted(late)[:9]
"""
    assert "insitu.drain.thread" in loaded_by(script)


def loaded_by(script: str) -> set[str]:
    """Return the modules a fresh interpreter holds after a script."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys\n{script}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


def test_stubs_are_those_of_their_proto(tmp_path: Path) -> None:
    wire = PACKAGES["insitu"] / "wire"
    protos = sorted(wire.glob("*.proto"))
    assert protos
    out = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'probe'}", *out, *map(str, protos)]
    subprocess.run(command, check=True, capture_output=True)
    made = {file.name: file.read_text() for file in tmp_path.rglob("*_pb2*.py*")}
    assert set(made) == {file.name for file in wire.glob("*_pb2*.py*")}
    for name, text in made.items():
        assert (wire / name).read_text() == text, f"probe/insitu/wire/{name} is stale: run protoc again"


def test_ci_runs_each_section_of_the_tests(sections: frozenset[str]) -> None:
    made = re.findall(r"make test-(\w+)", (ROOT / ".ci/run").read_text())
    assert sorted(made) == sorted(sections)


def test_every_file_the_architecture_page_names_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", page))
    assert len(named) > 20, "the page names the files of the project"
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("package", list(PACKAGES))
def test_the_architecture_page_names_every_file(package: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    files = [str(file.relative_to(ROOT)) for file in files_of(package)]
    unnamed = [name for name in files if name not in page and not re.search(r"__(init|main)__\.py$|_pb2", name)]
    assert unnamed == []
