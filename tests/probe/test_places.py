"""Where a process stands: what launchers say, and numbers that living processes do not share."""

from __future__ import annotations

import secrets
import subprocess
import sys

import pytest

from insitu.run.places import Place, claim_replica, global_rank, place_of

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}


@pytest.fixture
def run() -> str:
    return secrets.token_hex(8)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        (TORCHRUN, 3),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
        ({"RANK": "3"}, None),
        ({"RANK": "high", "WORLD_SIZE": "2"}, None),
        ({}, None),
    ],
)
def test_a_rank_is_what_a_launcher_says(environment: dict[str, str], rank: int | None) -> None:
    assert global_rank(environment) == rank


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ({}, Place(3, 0, 1, False)),
        ({"INSITU_CHILD_STAGE": "2"}, Place(3, 2, 1, False)),
        ({"INSITU_CHILD_STAGE": "rank"}, Place(3, 3, 1, False)),
    ],
)
def test_the_second_model_of_each_rank_is_the_second_replica(stage: dict[str, str], place: Place, run: str) -> None:
    assert place_of(1, run, TORCHRUN | stage) == place


def test_processes_that_know_of_no_other_are_numbered_as_they_come(run: str) -> None:
    assert place_of(0, run, {}) == Place(0, 0, 0, True)
    assert place_of(1, run, {"INSITU_CHILD_STAGE": "0"}) == Place(0, 0, 1, True)
    assert place_of(0, run, {"INSITU_CHILD_STAGE": "2"}) == Place(2, 2, 0, True), "each stage counts by itself"


def test_a_number_goes_with_its_process_and_the_next_takes_it(run: str) -> None:
    code = f"from insitu.run.places import claim_replica as claim; print(claim({run!r}, 0)); input()"
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "0\n"
        assert claim_replica(run, 0) == 1
        first.kill()
    assert claim_replica(run, 0) == 0


def test_a_forked_child_does_not_hold_its_parents_number(run: str) -> None:
    code = f"""
import os
from insitu.run.places import claim_replica
claim_replica({run!r}, 0)
if os.fork() == 0:
    print(claim_replica({run!r}, 0), flush=True)
    input()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() in ("0\n", "1\n")
        parent.wait()
        held = claim_replica(run, 0)
        assert held in (0, 1), "of two numbers the child holds one"
        assert claim_replica(run, 0) == 2
        parent.communicate("\n")
