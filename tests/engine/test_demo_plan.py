"""What a demo is to run is checked before anything starts, and every mistake is one line."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from insitu.cli import ExitCode
from insitu_engine.demo import demo
from insitu_engine.demo_plan import (
    RANDOM_KINDS,
    BadUse,
    default_model,
    draw_spec,
    fresh_store,
    num_layers,
    passed_on,
    resolve_specs,
)
from insitu_engine.inject import check_faults, parse_fault


@given(st.integers(), st.integers(1, 8), st.integers(1, 80))
def test_a_random_fault_is_one_the_engine_takes(seed: int, num_stages: int, layers: int) -> None:
    spec = draw_spec(random.Random(seed), num_stages, layers)
    fault = parse_fault(spec)
    check_faults([fault], num_stages, layers)
    assert fault.start_s >= 4, "some healthy traffic comes first"


def test_every_kind_is_drawn_and_the_seed_decides() -> None:
    drawn = [resolve_specs(["random"], seed, 2, 8) for seed in range(60)]
    assert {specs[0].partition("=")[0] for specs in drawn} == set(RANDOM_KINDS)
    assert drawn == [resolve_specs(["random"], seed, 2, 8) for seed in range(60)]


def test_options_are_passed_on_word_by_word() -> None:
    assert passed_on("--serve", "--kv-mib 1 --split '5,3'", ("--to",)) == ("--kv-mib", "1", "--split", "5,3")
    assert passed_on("--serve", "", ("--to",)) == ()


@pytest.mark.parametrize(
    ("text", "said"), [("--kv-mib '1", "cannot be read"), ("--to=x", "itself gives --to"), ("--to x", "leave it out")]
)
def test_options_that_cannot_be_passed_on_are_one_line(text: str, said: str) -> None:
    with pytest.raises(BadUse, match=said):
        passed_on("--serve", text, ("--to",))


def test_none_is_no_fault_and_stands_alone() -> None:
    assert resolve_specs(["none"], 0, 2, 8) == ()
    with pytest.raises(BadUse, match="give it alone"):
        resolve_specs(["none", "gc=0"], 0, 2, 8)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("slow", "not known"),
        ("slow-stage=2:25", "stage 2; there are 2"),
        ("gc=5", "rank 5; there are 2"),
        ("hang=-1:3", "hang=RANK:STEP"),
        ("nan=8:3", "layer 8; there are 8"),
        ("slow-stage=1:25@9-4", "ends before it starts"),
    ],
)
def test_a_wrong_spec_is_one_line_and_a_usage_error(tmp_path: Path, spec: str, said: str) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 8}')
    store = tmp_path / "store"
    result = CliRunner().invoke(demo, ["--model", str(tmp_path), "--store", str(store), "--inject", spec])
    assert result.exit_code == ExitCode.USAGE
    assert said in result.output
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
    assert not store.exists(), "nothing was started"


@pytest.mark.parametrize("config", [None, "", "{", "[]", "{}", '{"num_hidden_layers": "many"}'])
def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    result = CliRunner().invoke(demo, ["--model", str(tmp_path), "--store", str(tmp_path / "store")])
    assert result.exit_code == ExitCode.FAILURE
    assert str(tmp_path) in result.output
    assert result.output.count("\n") == 1


def test_more_stages_than_layers_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 8}')
    result = CliRunner().invoke(demo, ["--model", str(tmp_path), "--stages", "9", "--store", str(tmp_path / "store")])
    assert result.exit_code == ExitCode.FAILURE
    assert result.output == "Error: --stages 9 is not possible: the model has 8 layers and each stage needs one\n"
    assert not (tmp_path / "store").exists()


def test_the_checkpoint_that_comes_with_insitu_is_found() -> None:
    assert num_layers(default_model()) >= 2


def test_a_fresh_store_is_a_folder_nobody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "demo-now")
    assert [fresh_store(), fresh_store()] == [Path("insitu-store/demo-now"), Path("insitu-store/demo-now-2")]
    assert Path("insitu-store/demo-now-2").is_dir(), "it is claimed"


def test_many_demos_at_one_moment_get_a_store_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "demo-now")
    with ThreadPoolExecutor(8) as demos:
        found = list(demos.map(lambda _: fresh_store(), range(32)))
    assert len(set(found)) == 32


def test_no_room_for_a_store_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("insitu-store").write_text("mine")
    with pytest.raises(click.ClickException, match=r"made in insitu-store: file exists; give a folder with --store"):
        fresh_store()


def test_no_checkpoint_at_all_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("insitu_engine.demo_plan.__file__", str(tmp_path / "a/b/demo_plan.py"))
    with pytest.raises(click.ClickException, match="give --model"):
        default_model()
