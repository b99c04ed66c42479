"""Settings: argument before variable before file before default; what is shown is what is used."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.config import ONLY_ARGUMENTS, SETTINGS, Config, ConfigError, Origin, load
from insitu.segments.retention import Keep
from insitu.testing import Recording


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no variable of ours."""
    monkeypatch.chdir(tmp_path)
    for setting in SETTINGS:
        if setting.variable:
            monkeypatch.delenv(setting.variable, raising=False)
    return tmp_path


def shown(*arguments: str) -> dict[str, dict[str, Any]]:
    ran = CliRunner().invoke(command, ["config", "show", "--json", *arguments])
    assert ran.exit_code == 0, ran.output
    answer = json.loads(ran.stdout)
    assert answer["schema"] == "insitu.config/1"
    return {row["name"]: row for row in answer["settings"]}


def test_the_first_that_gives_a_value_counts(folder: Path) -> None:
    file = {"max_rows": "16"}
    variable = {"INSITU_MAX_ROWS": "32"}
    assert (load(folder, {}).max_rows, load(folder, {}).origin("max_rows")) == (2048, Origin.DEFAULT)
    (folder / "insitu.toml").write_text(f"max_rows = {file['max_rows']}\n")
    found = [load(folder, {}), load(folder, variable), load(folder, variable, max_rows=64)]
    assert [config.max_rows for config in found] == [16, 32, 64]
    assert [config.origin("max_rows") for config in found] == [Origin.FILE, Origin.ENVIRONMENT, Origin.ARGUMENT]
    assert load(folder, variable, max_rows=None).max_rows == 32, "None was not given"


sizes = st.none() | st.integers(1, 10**6)


@given(sizes, sizes, sizes)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example writes the one file anew
def test_precedence_whatever_is_given(argument: int | None, variable: int | None, key: int | None) -> None:
    environment = {} if variable is None else {"INSITU_MAX_ROWS": str(variable)}
    Path("insitu.toml").write_text("" if key is None else f"max_rows = {key}")
    given_values = [value for value in (argument, variable, key) if value is not None]
    assert load(Path(), environment, max_rows=argument).max_rows == (given_values or [2048])[0]


def test_every_setting_by_file_and_by_variable(folder: Path) -> None:
    (folder / "insitu.toml").write_text(
        'to = "file://./there"\ndisabled = true\nmax_rows = 9\nkeep_bytes = "1MiB"\nkeep_for = "none"\n'
        '[axes]\nlogits = "samples"\n'
    )
    config = load(folder, {})
    assert (config.to, config.disabled, config.max_rows) == ("file://./there", True, 9)
    assert (config.axes, config.keep) == ({"logits": "samples"}, Keep(1 << 20, None))
    environment = {
        "INSITU_TO": "grpc://h:1",
        "INSITU_DISABLED": "0",
        "INSITU_RUN": "00112233445566ff",
        "INSITU_KEEP_BYTES": "none",
        "INSITU_KEEP_FOR": "30m",
    }
    config = load(folder, environment)
    assert (config.to, config.disabled, config.run) == ("grpc://h:1", False, "00112233445566ff")
    assert config.keep == Keep(None, 1800.0)
    assert config.unknown == ()


def test_pyproject_speaks_where_there_is_no_file_of_ours(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[project]\nname = 'x'\n[tool.insitu]\nmax_rows = 5\n")
    config = load(folder, {})
    assert (config.max_rows, config.file) == (5, folder / "pyproject.toml")
    (folder / "insitu.toml").write_text("")
    config = load(folder, {})
    assert (config.max_rows, config.file) == (2048, folder / "insitu.toml")


def test_somebody_elses_pyproject_is_no_matter(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert load(folder, {}).file is None
    for broken in (b"no toml", b"[tool.mypy\nplugins = ['insitu']\n# [tool.insitu]", b"name = '\xff'"):
        (folder / "pyproject.toml").write_bytes(broken)
        found = load(folder, {})
        assert (found.file, found.warnings()) == (None, [])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"[project]\nname = x\n[tool.insitu]\nmax_rows = 5\n", "no TOML: Invalid value (at line 2, column 8)"),
        (b"a = 1\n  [ tool . 'insitu'\n", "no TOML: Expected ']' at the end of a table declaration (at line 2,"),
        (b"tool.insitu.to =\n", "no TOML: Invalid value (at line 1,"),
        (b"[tool.insitu.axes]\n\nlogits = '\xff'\n", "no UTF-8 (at line 3)"),
        ("\ufeff[tool.insitu]\n".encode(), "no TOML: Invalid statement (at line 1, column 1)"),
        ("[tool.insitu]\n".encode("utf-16"), "no UTF-8 (at line 1)"),
    ],
)
def test_a_broken_pyproject_with_settings_of_ours_is_a_warning_line_that_says_where(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: bytes, why: str
) -> None:
    (folder / "pyproject.toml").write_bytes(text)
    ran = CliRunner().invoke(command, ["config", "show"])
    assert ran.exit_code == 0
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"insitu: pyproject.toml is {why}")
    assert line.endswith(", so no [tool.insitu] in it sets anything; mend it there, or write insitu.toml beside it")
    monkeypatch.setattr("insitu.settled._said", set())
    for _ in range(2):
        insitu.start(to="memory://here").close()
    assert [message for message in caplog.messages if "pyproject" in message] == [line], "once"
    (folder / "insitu.toml").write_text("max_rows = 9\n")
    assert (load(folder, {}).max_rows, load(folder, {}).warnings()) == (9, []), "what is not read is no matter"


def test_a_pyproject_that_cannot_be_read_stops_nobody(folder: Path) -> None:
    (folder / "pyproject.toml").mkdir()
    (line,) = load(folder, {}).warnings()
    assert line.startswith(f"{folder}/pyproject.toml cannot be read: is a directory, so no [tool.insitu] in it sets")


@pytest.mark.timeout(20)
def test_a_pipe_where_a_file_of_settings_should_be_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pyproject.toml")
    (line,) = load(folder, {}).warnings()
    assert "cannot be read: is a pipe" in line
    os.mkfifo(folder / "insitu.toml")
    with pytest.raises(ConfigError, match=r"insitu\.toml cannot be read: is a pipe; see that it is a file"):
        load(folder, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_row = 5", "no setting 'max_row'; the settings are to, disabled, max_rows"),
        ("max_rows = 0", "is no count; write a whole number from 1"),
        ("max_rows = true", "is no count"),
        ("to = 5", "is no destination"),
        ('to = ["otlp://a", "otlp://b"]', "a session has one"),
        ("keep_bytes = 'lots'", "write it like 2GiB"),
        ("keep_for = 'long'", "write it like 24h"),
        ("axes = 'samples'", "is no table"),
        ("to =", "is no TOML"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_and_exit_2(folder: Path, text: str, words: str) -> None:
    (folder / "insitu.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"insitu\.toml") as raised:
        load(folder, {})
    assert words in str(raised.value)
    ran: Result = CliRunner().invoke(command, ["config", "show"])
    assert ran.exit_code == ExitCode.USAGE
    assert words in ran.output
    assert len(ran.output.splitlines()) == 1
    with pytest.raises(ValueError, match=r"insitu\.toml"):
        insitu.start()


def test_a_mistake_in_a_variable_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^INSITU_KEEP_FOR: 'ever' is no length of time"):
        load(Path(), {"INSITU_KEEP_FOR": "ever"})


def test_a_variable_that_means_nothing_is_a_warning_line(
    monkeypatch: pytest.MonkeyPatch, insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("INSITU_MAXROWS", "7")
    ran = CliRunner().invoke(command, ["config", "show"])
    assert ran.exit_code == 0
    assert "INSITU_MAXROWS means nothing to insitu; those that do are INSITU_CA_FILE, INSITU_CLIENT_CERT" in ran.stderr
    monkeypatch.setattr("insitu.settled._said", set())
    for _ in range(2):
        insitu.start(to=insitu_records).close()
    assert [message for message in caplog.messages if "INSITU_MAXROWS" in message] == caplog.messages
    assert len(caplog.messages) == 1, "once"


def test_the_engines_own_variables_are_no_settings_and_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_ENGINE_FAULTS", '["nan=1:2"]')
    ran = CliRunner().invoke(command, ["config", "show", "--json"])
    assert "nan=" not in ran.output
    assert json.loads(ran.stdout)["warnings"] == []


def test_what_is_shown_says_where_it_came_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_TO", "grpc://h:1")
    (folder / "insitu.toml").write_text("keep_for = '2h'")
    rows = shown()
    assert {name: (rows[name]["value"], rows[name]["from"]) for name in ("to", "keep_for", "keep_bytes")} == {
        "to": ("grpc://h:1", "environment"),
        "keep_for": ("2h", "file"),
        "keep_bytes": ("2GiB", "default"),
    }
    lines = CliRunner().invoke(command, ["config", "show"]).output.splitlines()
    (to,) = [line for line in lines if line.startswith("to ")]
    assert to.split()[:3] == ["to", "grpc://h:1", "INSITU_TO"]
    (kept,) = [line for line in lines if line.startswith("keep_for ")]
    assert kept.split()[:3] == ["keep_for", "2h", "insitu.toml"]


def test_everything_a_verb_takes_and_every_default_is_shown() -> None:
    rows = shown()
    taken = {**inspect.signature(insitu.start).parameters, **inspect.signature(insitu.attach).parameters}
    assert set(taken) - {"model", "source"} <= set(rows)
    assert {setting.name for setting in (*SETTINGS, *ONLY_ARGUMENTS)} == set(rows)
    assert [getattr(Config(), s.name) for s in SETTINGS] == [s.default for s in SETTINGS]
    attach = inspect.signature(insitu.attach).parameters
    assert [attach[s.name].default for s in ONLY_ARGUMENTS] == [s.default for s in ONLY_ARGUMENTS]


def test_what_is_shown_is_what_attach_uses(folder: Path) -> None:
    (folder / "insitu.toml").write_text("to = 'file://./mine'\nmax_rows = 3\nkeep_for = '1h'")
    with insitu.attach(nn.Linear(2, 2)) as session:
        assert session.to == shown()["to"]["value"] == "file://./mine"
        assert (folder / "mine" / "v1").is_dir()
        observer = session._observer
        assert observer is not None
        assert observer.plan.max_rows == shown()["max_rows"]["value"] == 3
        assert session._keep == Keep(max_age_s=3600.0)


def test_the_switch_in_a_file_and_in_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "insitu.toml").write_text("disabled = true")
    net = nn.Linear(2, 2)
    insitu.attach(net)
    assert type(net) is nn.Linear
    assert list(folder.iterdir()) == [folder / "insitu.toml"]
    (folder / "insitu.toml").write_text("broken")
    monkeypatch.setenv("INSITU_DISABLED", "1")
    insitu.attach(net)
    assert type(net) is nn.Linear, "the switch works whatever else is wrong"


def test_it_loads_nothing_heavy() -> None:
    script = "import sys, insitu.config_show; print({'numpy', 'torch', 'pyarrow', 'grpc'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
