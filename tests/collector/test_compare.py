"""`insitu compare` as a person runs it, on stores of simulated runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from record_kit import requests
from replica_kit import of_engines

from insitu.cli import ExitCode, insitu
from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.requests.latency import samples_of
from insitu_collector.simulate import Fault, Scenario, simulate, write_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A healthy run, and one whose second stage gets slow after four seconds."""
    healthy, slow = (tmp_path_factory.mktemp(name) / "store" for name in ("healthy", "slow"))
    write_store(simulate(Scenario(seed=4, seconds=12.0)), str(healthy))
    write_store(simulate(Scenario(seed=3, seconds=14.0, faults=(Fault("slow", 4.0, 1, ms=20.0),))), str(slow))
    return healthy, slow


def run(*arguments: object) -> Result:
    return CliRunner().invoke(insitu, ["compare", *map(str, arguments)])


def document(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_a_run_against_itself_differs_in_nothing(stores: tuple[Path, Path]) -> None:
    found = document(stores[0], stores[0], "--fail-on", "step-time>1.01", "--fail-on", "verdicts")
    assert found["schema"] == "insitu.compare/1"
    assert [step["ratio"]["value"] for step in found["steps"]] == [1.0, 1.0]
    assert found["sites"] == [] and found["num_sites"] > 0
    assert found["verdicts_gained"] == found["verdicts_lost"] == []
    assert found["fail_on"]["verdicts"] == "held"


def test_before_and_after_the_moment_a_stage_got_slow(stores: tuple[Path, Path]) -> None:
    ran = run(stores[1], "--at", "4", "--fail-on", "step-time>1.5")
    assert ran.exit_code == ExitCode.PROBLEMS_FOUND
    found = document(stores[1], "--at", "4")
    assert found["steps"][0]["ratio"]["high"] < 1.1
    assert found["steps"][1]["ratio"]["low"] > 2.5
    assert found["verdicts_gained"] == [{"kind": "stage_limits", "stage": 1, "rank": 1}]


def test_rank_against_rank_says_nothing_of_the_whole(stores: tuple[Path, Path]) -> None:
    found = document(stores[0], "--ranks", "0,1")
    [step] = found["steps"]
    assert (step["rank_a"], step["rank_b"]) == (0, 1)
    assert all(figure["a"] is None for figure in found["figures"])
    assert "0 -> 1" in run(stores[0], "--ranks", "0,1").stdout


def test_replica_against_replica_compares_ranks_of_one_place_and_what_each_is_judged(tmp_path: Path) -> None:
    slow = Fault("slow", 0.5, 1, replica=1, ms=20.0)
    write_store(of_engines(Scenario(seed=4, seconds=14.0, replicas=2, faults=(slow,))), str(tmp_path))
    found = document(tmp_path, "--replica-b", 1)
    assert [found[side].rpartition(", ")[2] for side in "ab"] == ["replica 0", "replica 1"]
    assert [(step["rank_a"], step["rank_b"]) for step in found["steps"]] == [(0, 2), (1, 3)]
    assert found["steps"][0]["ratio"]["high"] < 1.2 < 1.5 < found["steps"][1]["ratio"]["low"]
    assert found["verdicts_gained"] == [{"kind": "stage_limits", "stage": 1, "rank": 3}]
    back = document(tmp_path, "--replica-a", 1, "--replica-b", 0)
    assert (back["verdicts_gained"], back["verdicts_lost"]) == ([], found["verdicts_gained"])
    assert document(tmp_path, tmp_path)["a"].endswith("replica 0")
    wrong = run(tmp_path, "--replica-b", 2)
    assert (wrong.exit_code, "has no replica 2; it has 0, 1" in wrong.stderr) == (ExitCode.FAILURE, True)


def test_too_little_to_tell_is_partial(stores: tuple[Path, Path]) -> None:
    ran = run(stores[0], "--at", "0.5", "--fail-on", "step-time>1.2")
    assert ran.exit_code == ExitCode.PARTIAL
    assert "too little to tell" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        ((), "compared with", ExitCode.USAGE),
        (("--at", "1", "--ranks", "0,1"), "leave B", ExitCode.USAGE),
        (("--ranks", "0"), "two ranks", ExitCode.USAGE),
        (("--ranks", "0,1", "--fail-on", "speed>2"), "no condition", ExitCode.USAGE),
        (("--ranks", "0,7"), "no rank 7; its ranks are 0, 1", ExitCode.FAILURE),
        (("--at", "900"), "none on both sides", ExitCode.FAILURE),
        (("--run-b", "ffff"), "no run ffff...", ExitCode.FAILURE),
        (("/nowhere",), "no store at /nowhere", ExitCode.FAILURE),
    ],
)
def test_a_mistake_is_one_line(
    stores: tuple[Path, Path], arguments: tuple[str, ...], said: str, status: ExitCode
) -> None:
    ran = run(stores[0], *arguments)
    assert ran.exit_code == status
    assert said in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


def test_warm_up_alone_is_nothing_to_compare(tmp_path: Path) -> None:
    tables = simulate(Scenario(seed=1, seconds=0.01, requests_per_s=0.001, warmup_steps=30))
    write_store({name: rows for name, rows in tables.items() if name not in ("requests", "steps")}, str(tmp_path))
    ran = run(tmp_path, tmp_path)
    assert ran.exit_code == ExitCode.FAILURE
    assert "no step of traffic" in ran.stderr


def test_latencies_are_taken_from_events_in_any_order() -> None:
    events = [
        ("a", RequestEvent.TOKEN, 35),
        ("a", RequestEvent.ARRIVED, 0),
        ("b", RequestEvent.FIRST_TOKEN, 50),  # its arrival was lost: no time to first token
        ("a", RequestEvent.FIRST_TOKEN, 30),
        ("a", RequestEvent.FINISHED, 36),
        ("b", RequestEvent.TOKEN, 57),
        ("warmup-1", RequestEvent.ARRIVED, 0),
        ("warmup-1", RequestEvent.FIRST_TOKEN, 1),
        ("a", 77, 31),  # of a newer version
    ]
    rows = requests((name, event, t * 10**9) for name, event, t in events)
    ttft, itl, tokens = samples_of(rows, Timeline())
    assert (ttft.tolist(), sorted(itl.tolist()), tokens) == ([30.0], [5.0, 7.0], 4)
    ttft, itl, tokens = samples_of(requests([]), Timeline())
    assert (len(ttft), len(itl), tokens) == (0, 0, 0)
