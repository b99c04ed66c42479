"""Where a process stands: what launchers say, and numbers that living processes do not share."""

from __future__ import annotations

import secrets
import subprocess
import sys

import pytest
import torch
from torch import nn

import insitu
from insitu.config import ConfigError
from insitu.run.places import Place, claim_replica, global_rank, place_of
from insitu.testing import Recording

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
        ({"RANK": "high"}, None),
        ({"RANK": "3", "WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "2"}, None),
        ({"RANK": "", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
        ({}, None),
    ],
)
def test_a_rank_is_what_a_launcher_says(environment: dict[str, str], rank: int | None) -> None:
    assert global_rank(environment) == rank


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "high", "WORLD_SIZE": "2"}, "RANK: 'high' is no rank where WORLD_SIZE is 2; write a whole number"),
        (
            {"RANK": "5", "WORLD_SIZE": "2"},
            "RANK: '5' is no rank where WORLD_SIZE is 2; write a whole number from 0 to 1",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: '-1' is no rank"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK: '1.0' is no rank"),
        ({"RANK": "40000", "WORLD_SIZE": "50000"}, "RANK: '40000' is no rank where WORLD_SIZE is 50000; .* to 32767"),
        ({"LOCAL_RANK": "2", "WORLD_SIZE": "2"}, "LOCAL_RANK: '2' is no rank"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is no count; write a whole number from 1, as your"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' is no count"),
    ],
)
def test_what_is_no_rank_is_a_line_at_attach_and_the_model_is_as_it_was(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, insitu_records: Recording
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=f"^{said}") as raised:
        insitu.attach(model, to=insitu_records)
    assert "\n" not in str(raised.value)
    assert type(model) is nn.Linear
    with insitu.attach(model, to=insitu_records, rank=0):
        model(torch.ones(1, 2))
    assert len(insitu_records.rows("steps")) == 1, "a rank that code says is asked of no launcher"


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
