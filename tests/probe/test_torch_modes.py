"""Modules that torch wraps, shards, stages or exports: observed, or refused with a reason and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_modes import TORCH_MODES, Small, TorchMode, X, outcome, ranks
from torch_ranks import NUM_FORWARDS, NUM_MICRO_BATCHES

import insitu
from insitu.testing import Recording
from insitu.vocabulary import IntervalClass, Numbers

CLASSES = Numbers(IntervalClass, "class")
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch's own, of what it unflattens
]


@pytest.mark.parametrize("mode", TORCH_MODES, ids=lambda mode: mode.title)
def test_a_module_is_observed_or_refused_with_a_remedy(mode: TorchMode) -> None:
    found = outcome(mode)
    assert found.is_same
    if found.refused:
        assert "\n" not in found.refused
        assert "attach to " in found.refused
    else:
        assert found.num_steps == found.num_forwards
        assert found.fired == found.num_sites > 0


@pytest.mark.parametrize("way", ["ddp", "fsdp1", "fsdp2"])
def test_sites_have_the_same_names_whenever_a_model_is_wrapped(way: str) -> None:
    for number, rank in enumerate(ranks()):
        before, after = rank[f"{way} before"], rank[f"{way} after"]
        assert before["names"] == after["names"]
        assert "L1.resid_post" in after["names"]
        assert before["rank"] == after["rank"] == number, "as torchrun says"


def test_stages_count_the_same_steps_and_say_who_they_are() -> None:
    first, second = (rank["stages"] for rank in ranks())
    micro_batches = [[1 + step, step % NUM_MICRO_BATCHES] for step in range(NUM_FORWARDS * NUM_MICRO_BATCHES)]
    assert first["steps"] == second["steps"] == [[0, 0], *micro_batches], "the first tries what shapes there are"
    assert first["source"] == {"rank": 0, "stage": 0, "pp_rank": 0}
    assert second["source"] == {"rank": 1, "stage": 1, "pp_rank": 1}
    assert first["left"] == second["left"] == [], "a stage is as it was"


def test_the_later_stage_says_what_it_waited_for() -> None:
    first, second = (rank["stages"] for rank in ranks())
    waits, (_, *computes) = (_of_class(second, name) for name in ("recv_wait", "compute"))
    assert _of_class(first, "recv_wait") == []
    assert [(wait["step_id"], wait["mb"]) for wait in waits] == [(step, mb) for step, mb in second["steps"][1:]]
    assert {wait["peer"] for wait in waits} == {0}
    assert {wait["bytes"] for wait in waits} == {2 * 16 * 4}, "a micro-batch of two rows"
    assert len(computes) == len(waits)
    assert all(wait["t1_ns"] <= compute["t0_ns"] for wait, compute in zip(waits, computes, strict=True))


def _of_class(rank: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [each for each in rank["intervals"] if each["cls"] == CLASSES[name]]


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 5),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
        ({"RANK": "5"}, 0),
    ],
)
def test_the_rank_is_what_the_launcher_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for told, expected in ((None, rank), (3, 3)):
        records = Recording()
        insitu.attach(Small(), to=records, rank=told).close()
        assert [row["rank"] for row in records.rows("sources")] == [expected]


def test_a_stage_that_is_not_as_it_is_known_is_refused() -> None:
    class _PipelineStageBase:
        submod = None

    with pytest.raises(ValueError, match="attach to the module that it runs"):
        insitu.attach(_PipelineStageBase())  # type: ignore[arg-type]


def test_a_module_that_refuses_is_unharmed() -> None:
    program = torch.export.export(Small().eval(), (X,))
    module = program.module()
    before = module(X)
    with pytest.raises(ValueError, match="unflatten"):
        insitu.attach(module)
    assert torch.equal(module(X), before)
    assert "forward" not in vars(module)
