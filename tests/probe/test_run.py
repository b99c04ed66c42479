"""The command line of `insitu run`: what the command finds in its environment, and what is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from package_kit import install

from insitu.cli import ExitCode, insitu
from insitu.plugins.discovery import EXPORTERS
from insitu.run.command import CANNOT_RUN, NOT_FOUND, STARTUP, environment_of, is_deaf
from insitu.setting_values import is_on


def test_the_startup_folder_holds_a_sitecustomize_and_nothing_else() -> None:
    assert [path.name for path in STARTUP.iterdir() if path.name != "__pycache__"] == ["sitecustomize.py"]


def test_it_leads_the_path_once_and_what_was_set_stays() -> None:
    first = environment_of({"PYTHONPATH": "/a:/b", "HOME": "/h"}, "grpc://h:1", "2", None)
    assert first == {
        "PYTHONPATH": f"{STARTUP}:/a:/b",
        "HOME": "/h",
        "INSITU_TO": "grpc://h:1",
        "INSITU_CHILD_STAGE": "2",
    }
    again = environment_of(first, None, None, "*LM")
    assert again == first | {"INSITU_CHILD_MODEL": "*LM"}
    assert environment_of({}, None, None, None) == {"PYTHONPATH": str(STARTUP)}
    assert environment_of({"PYTHONPATH": ":/a"}, None, None, None) == {"PYTHONPATH": f"{STARTUP}::/a"}


@pytest.mark.parametrize(
    ("command", "deaf"),
    [
        ("python serve.py -I", False),
        ("python -I serve.py", True),
        ("/opt/bin/python3.12 -BE -m serve", True),
        ("python -W ignore -S serve.py", True),
        ("python -X importtime serve.py", False),
        ("python -WI serve.py", False),
        ("python -c SystemExit", False),
        ("python -uc SystemExit", False),
        ("torchrun -I serve.py", False),
        ("python", False),
    ],
)
def test_a_python_that_will_not_listen_is_told_from_one_that_will(command: str, deaf: bool) -> None:
    assert is_deaf(command.split()) is deaf


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "store", "--", "x"], "'store' is no destination; write it like grpc://HOST:PORT or file://STORE"),
        (["--to", " file:///x", "--", "x"], "' file:///x' is no destination"),
        (["--to", "fi\tle:///x", "--", "x"], "is no destination"),
        (["--to", "grpc:127.0.0.1:4317", "--", "x"], "'grpc:127.0.0.1:4317' is no destination"),
        (["--stage", "-1", "--", "x"], "'-1' is no stage; write a number from 0 to 32767, or rank"),
        (["--stage", "99999", "--", "x"], "'99999' is no stage; write a number from 0 to 32767, or rank"),
        (["--stage", "9" * 5000, "--", "x"], "is no stage; write a number from 0 to 32767, or rank"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(options: list[str], said: str) -> None:
    result = CliRunner().invoke(insitu, ["run", *options])
    assert result.exit_code == ExitCode.USAGE
    assert said in result.output


def test_a_destination_of_another_package_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "acme_ships", {EXPORTERS: {"carrier-pigeon": "acme_ships:Pigeon"}})
    became: list[str] = []
    monkeypatch.setattr("insitu.run.command.become", lambda _, variables: became.append(variables["INSITU_TO"]))
    result = CliRunner().invoke(insitu, ["run", "--to", "carrier-pigeon://x", "--", "x"])
    assert became == ["carrier-pigeon://x"], result.output


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("INSITU_")}
    command = [sys.executable, "-m", "insitu", "run", *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)


def test_a_command_that_does_not_start_has_the_status_a_shell_gives_it(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    missing, plain = run(tmp_path, "--", "./nothing"), run(tmp_path, "--", "./plain")
    assert (missing.returncode, missing.stderr) == (NOT_FOUND, "insitu: ./nothing: No such file or directory\n")
    assert (plain.returncode, plain.stderr) == (CANNOT_RUN, "insitu: ./plain: Permission denied\n")


def test_options_of_the_command_are_its_own_and_a_store_is_where_it_was_typed(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['INSITU_TO'], len(os.environ['INSITU_RUN']))"
    done = run(tmp_path, "--to", "file://./seen", sys.executable, "-c", code, "--to", "x")
    assert (done.returncode, done.stdout) == (0, f"['--to', 'x'] file://{tmp_path}/seen 16\n"), done.stderr


def test_a_pipe_that_breaks_kills_the_command_as_without_us(tmp_path: Path) -> None:
    done = run(tmp_path, "--", "bash", "-c", "yes | head -n 1; echo ${PIPESTATUS[0]}")
    assert done.stdout == "y\n141\n"


def test_nothing_of_insitu_is_imported_before_torch_is(tmp_path: Path) -> None:
    code = "import sys, json; print([name for name in sys.modules if name.split('.')[0] == 'insitu'])"
    assert run(tmp_path, "--", sys.executable, "-c", code).stdout == "[]\n"
    code = "import importlib.util, sys; importlib.util.find_spec('torch'); print('torch' in sys.modules)"
    assert run(tmp_path, "--", sys.executable, "-c", code).stdout == "False\n"


def test_a_python_that_ignores_its_environment_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, "--", sys.executable, "-I", "-c", "print('served')")
    assert (done.returncode, done.stdout) == (0, "served\n")
    assert done.stderr == "insitu: nothing is observed of a Python with -I, -E or -S: it never looks at us\n"


@pytest.mark.parametrize("word", ["", "0", " No ", "OFF", "1", "on", "yes"])
def test_what_starts_with_a_python_reads_the_switch_as_all_else_does(word: str, tmp_path: Path) -> None:
    code = "import sys; print(any(type(each).__name__ == 'AfterTorch' for each in sys.meta_path))"
    variables = {**os.environ, "INSITU_DISABLED": word, "PYTHONPATH": str(STARTUP)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{not is_on(word)}\n", done.stderr
