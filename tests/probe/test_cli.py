"""The `insitu` command: fast to start, one line for what is missing, exit codes that mean something."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints, PackageNotFoundError
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from insitu import cli
from insitu.cli import COMMANDS, Entry, ExitCode, insitu
from insitu.identity import package_version

HEAVY = ("torch", "pyarrow", "grpc", "transformers", "numpy", "duckdb", "starlette", "httpx", "importlib.metadata")


def modules_after(*args: str) -> set[str]:
    """Return the modules a fresh `insitu ARGS` has loaded when it exits."""
    script = (
        "import sys\nfrom insitu.cli import main\n"
        f"try:\n    main({list(args)!r})\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


def test_help_loads_nothing_heavy() -> None:
    loaded = modules_after("--help")
    assert "insitu.cli" in loaded
    assert not loaded.intersection(HEAVY)


def test_version_loads_no_dependency_but_click() -> None:
    assert not modules_after("--version").intersection(set(HEAVY) - {"importlib.metadata"})


def test_version_says_the_version() -> None:
    result = CliRunner().invoke(insitu, ["--version"])
    assert (result.exit_code, result.output) == (0, f"insitu {package_version()}\n")


def test_help_lists_every_command_that_is_not_hidden() -> None:
    listed = CliRunner().invoke(insitu, ["--help"]).output
    for name, entry in COMMANDS.items():
        assert (f"\n  {name} " in listed) is not entry.hidden


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_loads_and_its_help_has_two_examples(name: str) -> None:
    result = CliRunner().invoke(insitu, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.count(f"  insitu {name}") >= 2, result.output


def test_unknown_word_lists_the_commands() -> None:
    result = CliRunner().invoke(insitu, ["dmeo"])
    assert result.exit_code == ExitCode.USAGE
    assert "no command 'dmeo'; the commands are demo, serve" in result.output


def test_unknown_option_is_a_usage_error() -> None:
    assert CliRunner().invoke(insitu, ["--nope"]).exit_code == ExitCode.USAGE


def test_a_missing_extra_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "serve", Entry("a_package_nobody_has.serve:serve", "Serve.", "engine"))
    result = CliRunner().invoke(insitu, ["serve"])
    assert result.exit_code == ExitCode.FAILURE
    said = "Error: `insitu serve` needs the package a_package_nobody_has, which is not installed: "
    assert result.output == f"{said}pip install 'insitu[engine]'\n"


def test_an_extra_missed_while_running_is_the_same_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def late() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "_a_late_command", late, raising=False)
    monkeypatch.setitem(COMMANDS, "serve", Entry("insitu.cli:_a_late_command", "Serve.", "engine"))
    result = CliRunner().invoke(insitu, ["serve"])
    assert result.exit_code == ExitCode.FAILURE
    assert result.output.endswith("needs the package torch, which is not installed: pip install 'insitu[engine]'\n")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EIO])
def test_what_the_system_refuses_meanwhile_is_one_line(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    @click.command()
    def late() -> None:
        raise OSError(number, os.strerror(number), "store/v1/open")

    monkeypatch.setattr(cli, "_a_late_command", late, raising=False)
    monkeypatch.setitem(COMMANDS, "serve", Entry("insitu.cli:_a_late_command", "Serve.", "engine"))
    result = CliRunner().invoke(insitu, ["serve"])
    assert result.exit_code == ExitCode.FAILURE
    said = f"Error: store/v1/open: {os.strerror(number)}; "
    assert result.output == f"{said}see that it is there, that it is yours, and that its disk has room\n"


def test_an_error_that_is_not_the_systems_gets_no_advice_about_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def late() -> None:
        raise OSError("these bytes are no message")

    monkeypatch.setattr(cli, "_a_late_command", late, raising=False)
    monkeypatch.setitem(COMMANDS, "serve", Entry("insitu.cli:_a_late_command", "Serve.", "engine"))
    assert CliRunner().invoke(insitu, ["serve"]).output == "Error: these bytes are no message\n"


def test_a_reader_that_goes_away_ends_it_without_a_word() -> None:
    command = [sys.executable, "-m", "insitu", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
        assert shown.stdout is not None and shown.stderr is not None
        shown.stdout.close()  # before it has anything to print
        assert shown.stderr.read() == ""
    assert shown.returncode == ExitCode.FAILURE


@pytest.mark.parametrize(
    ("called", "typed"), [(".venv/bin/insitu", ".venv/bin/insitu"), ("/x/insitu/__main__.py", "python -m insitu")]
)
def test_what_is_shown_to_be_pasted_can_be_pasted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, called: str, typed: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.command_name() == typed
    (tmp_path / "insitu").touch(mode=0o755)
    assert cli.command_name() == "insitu"


def test_a_missing_module_of_ours_is_a_bug_and_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "serve", Entry("insitu.no_such_module:serve", "Serve.", "engine"))
    result = CliRunner().invoke(insitu, ["serve"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_an_entry_point_brings_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def scan(group: str, name: str) -> EntryPoints:
        asked.append(name)
        return EntryPoints([EntryPoint("greet", "plug_in:greet", group)] if name == "greet" else [])

    @click.command()
    def greet() -> None:
        click.echo("hello")

    monkeypatch.setattr("importlib.metadata.entry_points", scan)
    monkeypatch.setattr(EntryPoint, "load", lambda self: greet)
    assert CliRunner().invoke(insitu, ["greet"]).output == "hello\n"
    assert set(asked) == {"greet"}
    asked.clear()
    assert CliRunner().invoke(insitu, ["doctor", "--help"]).exit_code == 0
    assert asked == [], "our own words never scan"


def test_an_entry_point_that_is_no_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints([EntryPoint("greet", "plug_in:greet", cli.ENTRY_POINTS)])
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group, name: points)
    monkeypatch.setattr(EntryPoint, "load", lambda self: object())
    result = CliRunner().invoke(insitu, ["greet"])
    assert result.exit_code == ExitCode.FAILURE
    assert "plug_in:greet) is not a click command" in result.output


def test_doctor_prints_one_document() -> None:
    result = CliRunner().invoke(insitu, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert report["schema"] == "insitu.doctor/1"
    assert {check["status"] for check in report["checks"]} <= {"ok", "warn", "problem"}
    problems = [check for check in report["checks"] if check["status"] == "problem"]
    assert report["num_problems"] == len(problems)
    assert result.exit_code == (ExitCode.PROBLEMS_FOUND if problems else ExitCode.OK)
    assert all(check["fix"] for check in report["checks"] if check["status"] != "ok")


def test_the_probe_alone_is_a_whole_use() -> None:
    """No extra installed: warnings that name the extra, no problem."""
    from insitu.doctor import Status, check_package

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    torch = check_package("torch", "2.8", "engine", absent)
    assert (torch.status, torch.fix) == (Status.WARN, "pip install 'insitu[engine]'")
    assert check_package("pyarrow", "23.0.1", None, absent).status is Status.PROBLEM
