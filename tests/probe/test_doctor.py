"""`insitu doctor`: each check sees what it is for, and the last line is a command that helps."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from insitu import doctor
from insitu.cli import ExitCode
from insitu.doctor import Check, Status, next_command


def test_an_old_python_is_a_problem() -> None:
    assert doctor.check_python((3, 10, 4)).status is Status.PROBLEM
    assert doctor.check_python((3, 11, 0)).status is Status.OK


@pytest.mark.parametrize(
    ("found", "status"),
    [("2.8.0", "ok"), ("2.13.0+cpu", "ok"), ("2.10", "ok"), ("3", "ok"), ("2.7.9", "problem"), ("2.8rc1", "ok")],
)
def test_a_package_is_compared_by_numbers(found: str, status: str) -> None:
    assert doctor.check_package("torch", "2.8", "engine", lambda name: found).status == status


def test_what_grpc_does_at_forks_is_said_where_a_setting_changes_it() -> None:
    assert doctor.check_fork({"GRPC_ENABLE_FORK_SUPPORT": "0"}).status is Status.PROBLEM
    assert doctor.check_fork({"GRPC_ENABLE_FORK_SUPPORT": "1"}).status is Status.WARN
    assert doctor.check_fork({}).status is Status.OK


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


def test_taps_are_kernels_where_there_is_a_device_and_triton(tmp_path: Path) -> None:
    device = tmp_path / "nvidiactl"
    assert "no NVIDIA device" in doctor.check_taps(absent, device, {}).why
    device.touch()
    assert (doctor.check_taps(absent, device, {}).status, doctor.check_taps(absent, device, {}).fix) == (
        Status.WARN,
        "pip install triton",
    )
    assert doctor.check_taps(lambda name: "3.7.0", device, {}).why == "one kernel a site on CUDA, by Triton 3.7.0"
    assert "INSITU_FUSED_TAPS" in doctor.check_taps(absent, device, {"INSITU_FUSED_TAPS": "0"}).why


def test_a_folder_that_takes_no_file_is_a_problem(tmp_path: Path) -> None:
    assert doctor.check_writable(tmp_path).status is Status.OK
    under_a_file = tmp_path / "file"
    under_a_file.write_text("")
    check = doctor.check_writable(under_a_file)
    assert (check.status, str(under_a_file) in check.why) == (Status.PROBLEM, True)


def test_little_space_is_a_warning(tmp_path: Path) -> None:
    assert doctor.check_space(tmp_path, free_bytes=1 << 20).status is Status.WARN
    assert doctor.check_space(tmp_path, free_bytes=1 << 40).status is Status.OK


def test_a_taken_port_is_seen_and_another_offered() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port: int = holder.getsockname()[1]
        taken = doctor.check_port(port)
    assert (taken.status, taken.fix) == (Status.WARN, f"insitu collect --port {port + 10}")


def ticking(step_ns: int, reads_a_tick: int = 1) -> Iterator[int]:
    for count in range(10_000):
        yield count // reads_a_tick * step_ns


@pytest.mark.parametrize(("step_ns", "status"), [(70, "ok"), (15_000_000, "warn"), (-5, "problem")])
def test_a_clock_is_judged_by_its_steps(step_ns: int, status: str) -> None:
    ticks = ticking(step_ns, reads_a_tick=3)
    assert doctor.check_clock(lambda: next(ticks)).status == status


def test_few_or_busy_cores_are_a_warning() -> None:
    assert doctor.check_cores(1, 0.0).status is Status.WARN
    assert doctor.check_cores(2, 1.9).status is Status.WARN
    assert doctor.check_cores(2, 0.4).status is Status.OK


def test_the_last_line_is_what_to_do_next() -> None:
    fine = Check("python", Status.OK, "3.11")
    absent = Check("torch", Status.WARN, "absent", "pip install 'insitu[engine]'")
    broken = Check("write", Status.PROBLEM, "cannot write", "pass --store DIR")
    assert next_command([fine]) == "insitu demo"
    assert next_command([fine, absent]) == "pip install 'insitu[all]'"
    assert next_command([absent, broken]) == "pass --store DIR"


def test_a_problem_sets_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Check("write", Status.PROBLEM, "cannot write", "pass --store DIR")
    monkeypatch.setattr(doctor, "run_checks", lambda *_: [broken])
    result = CliRunner().invoke(doctor.doctor, [])
    assert result.exit_code == ExitCode.PROBLEMS_FOUND
    assert "write             problem  cannot write\n" in result.output
    assert result.output.endswith("next: pass --store DIR\n")


def test_a_collector_is_the_one_that_is_named_or_where_records_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert doctor.collector_address("there:1", None) == "grpc://there:1"
    assert doctor.collector_address("grpcs://there:1", None) == "grpcs://there:1"
    assert doctor.collector_address(None, "grpc://here:2") == "grpc://here:2"
    assert doctor.collector_address(None, "GRPC://here:2") == "GRPC://here:2"
    with socket.create_server(("127.0.0.1", 0)) as usual:
        monkeypatch.setattr(doctor, "COLLECTOR_PORT", usual.getsockname()[1])
        assert doctor.collector_address(None, "file://store") == f"grpc://127.0.0.1:{doctor.COLLECTOR_PORT}"
    assert doctor.collector_address(None, "file://store") is None


@pytest.mark.parametrize(
    ("name", "text", "why", "fix"),
    [
        ("insitu.toml", "to = [", "{} is no TOML: Invalid value (at end of document)", "mend it there, or take"),
        ("insitu.toml", "too = 1", "{}: no setting 'too'", "the settings are to, "),
        ("insitu.toml", "to = 3", "to in {}: 3 is no destination", "write a URL like file://./insitu-store"),
        ("insitu.toml", b"\xff\xfe", "{} is no UTF-8 (at line 1)", "write it anew, or take it away"),
        ("insitu.toml/x", "", "{} cannot be read: is a directory", "see that it is a file, and yours"),
        ("pyproject.toml", "[tool]\ninsitu = 3", "{}: tool.insitu is no table", "write [tool.insitu] above its"),
    ],
)
def test_settings_that_cannot_be_used_are_a_finding_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | bytes, why: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = [check.check for check in doctor.run_checks(Path())]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)
    result = CliRunner().invoke(doctor.doctor, ["--json"])
    assert result.exit_code == ExitCode.PROBLEMS_FOUND
    checks = {check["check"]: check for check in json.loads(result.stdout)["checks"]}
    assert [*checks] == [check for check in whole if check != "credentials"]
    assert checks["settings"]["status"] == Status.PROBLEM
    assert checks["settings"]["why"] == why.format(tmp_path / name.partition("/")[0])
    assert checks["settings"]["fix"].startswith(fix)


def test_settings_are_told_with_their_file_and_variables_that_mean_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_settings(tmp_path)[0] == Check("settings", Status.OK, "no insitu.toml; variables and defaults")
    (tmp_path / "pyproject.toml").write_text("[tool.insitu\n")
    found, _ = doctor.check_settings(tmp_path)
    assert (found.status, found.fix) == (Status.WARN, "mend it there, or write insitu.toml beside it")
    (tmp_path / "insitu.toml").write_text("max_rows = 8")
    found, config = doctor.check_settings(tmp_path)
    assert (found.status, found.why) == (Status.OK, str(tmp_path / "insitu.toml"))
    assert config is not None and config.max_rows == 8
    monkeypatch.setenv("INSITU_MAXROWS", "8")
    found, _ = doctor.check_settings(tmp_path)
    assert (found.status, found.why) == (Status.WARN, "the variable INSITU_MAXROWS means nothing to insitu")
