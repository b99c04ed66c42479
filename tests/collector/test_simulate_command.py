"""`insitu simulate` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from insitu_collector.simulate import Fault
from insitu_collector.simulate.command import simulate
from insitu_collector.simulate.spec import FORMS, parse_fault
from insitu_collector.store import open_store


def run(*args: str) -> Result:
    return CliRunner().invoke(simulate, list(args))


def test_a_store_of_any_grid_is_written_and_nothing_in_it_says_what_was_asked_for(tmp_path: Path) -> None:
    store = tmp_path / "store"
    size = ("--seconds", "3", "--stages", "3", "--tensor-parallel", "2", "--replicas", "2", "--hosts", "2")
    found = run("--store", str(store), *size, "--fault", "slow=r1/2.1:31.25@1", "--fault", "kv-small=777", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.output)
    assert (told["schema"], told["replicas"], told["stages"], told["tensor_parallel"]) == ("insitu.simulate/1", 2, 3, 2)
    assert [fault["kind"] for fault in told["faults"]] == ["slow", "kv_small"]
    stored = open_store(store)
    assert {name: stored.table(name).num_rows for name in stored.tables()} == told["rows"]
    written = "".join(str(stored.table(name).to_pylist()) for name in ("sources", "sites", "events"))
    assert not any(word in written for word in ("slow", "31.25", "kv_small", "777"))


def test_the_same_seed_is_the_same_store(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("--store", str(tmp_path / name), "--seconds", "2", "--seed", "7").exit_code == 0
    a, b = open_store(tmp_path / "a"), open_store(tmp_path / "b")
    assert all(a.table(name).equals(b.table(name)) for name in a.tables())


def test_service_times_come_from_a_store(tmp_path: Path) -> None:
    assert run("--store", str(tmp_path / "a"), "--seconds", "10").exit_code == 0
    found = run("--store", str(tmp_path / "b"), "--seconds", "2", "--from", str(tmp_path / "a"))
    assert found.exit_code == 0, found.output
    assert "look: insitu stalls" in found.output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--fault", "sloth=1"), "'sloth=1' is not known; it may be slow=RANKS:MS"),
        (("--fault", "slow=h1:3"), "is not slow=RANKS:MS"),
        (("--fault", "gc=1"), "is not gc=RANKS:MS[:EVERY_S]"),
        (("--stages", "200", "--tensor-parallel", "4"), "800 ranks"),
        (("--fault", "experts=1:2:0.9"), "no layer 2 with experts"),
        (("--fault", "slow=9:5"), "outside the grid"),
        (("--from", "nowhere"), "no store at nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(args: tuple[str, ...], says: str, tmp_path: Path) -> None:
    found = run("--store", str(tmp_path / "store"), *args)
    assert found.exit_code in (1, 2)
    assert says in found.output
    assert "Traceback" not in found.output
    assert not (tmp_path / "store").exists()


def test_a_store_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    assert "a folder of its own" in run("--store", str(tmp_path)).output


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("slow=1:20", Fault("slow", stage=1, ms=20.0)),
        ("slow-computing=r2/1.3:20@5-9.5", Fault("slow", 5.0, 1, 9.5, 20.0, on_cpu=True, tp=3, replica=2)),
        ("fail-slow=h1:1.5:10@2", Fault("fail_slow", 2.0, host=1, factor=1.5, ramp_s=10.0)),
        ("fail-slow=0:1.5", Fault("fail_slow", stage=0, factor=1.5)),
        ("experts=r1/0:3:0.8@4", Fault("experts", 4.0, 0, layer=3, share=0.8, replica=1)),
        ("nan=0:3@4", Fault("nan", 4.0, 0, layer=3)),
        ("long-prompts=512:0.2", Fault("long_prompts", size=512.0, share=0.2)),
        ("clock-unknown=h0", Fault("clock_unknown", host=0)),
    ],
)
def test_faults_as_they_are_written(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


def test_each_form_that_help_names_is_read() -> None:
    values = {"RANKS|HOST": "0", "RANKS": "0", "HOST": "h0", "[": "", "]": ""}
    for form in FORMS.split(", "):
        text = form
        for word, value in values.items():
            text = text.replace(word, value)
        word, _, rest = text.partition("=")
        filled = [part if part.lstrip("h").isdecimal() else "3" for part in rest.split(":")]
        assert parse_fault(f"{word}={':'.join(filled)}@1-2").at_s == 1.0


def test_a_folder_that_cannot_be_written_is_one_line() -> None:
    found = run("--store", "/dev/null/store", "--seconds", "1")
    assert found.exit_code == 1
    assert found.output == "Error: /dev/null/store cannot be written: not a directory; give another --store\n"
