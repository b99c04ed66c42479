"""Row 17 of the failure matrix: hostile frames and requests end no process, and what is accepted is read back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import ClassVar

import pytest
from frame_mutations import mutated
from frame_target import CorpusTarget, FrameTarget
from fuzz import MAX_RSS_BYTES, Result, run
from otlp_in_kit import normal
from otlp_mutations import CORPUS
from otlp_mutations import mutated as otlp_mutated
from otlp_target import OtlpTarget

from insitu_collector.otlp.bodies import from_json
from insitu_collector.otlp.signals import SIGNALS

pytestmark = pytest.mark.matrix

NUM_INPUTS = 16_000
NUM_REQUESTS = 4_000


@pytest.fixture(scope="module")
def sampled() -> Result:
    return run("frame_target:FrameTarget", 0, NUM_INPUTS, 1)


def test_row_17_no_frame_ends_the_process_or_is_stored_as_something_else(sampled: Result) -> None:
    assert sampled.faults == []
    assert sampled.refused.total() == NUM_INPUTS
    assert 0 < sampled.max_rss_bytes < MAX_RSS_BYTES


def test_row_17_the_inputs_come_deep_enough_to_prove_something(sampled: Result) -> None:
    passed = sampled.passed(FrameTarget.CHECKS)
    assert passed["schema"] > 0.1 * NUM_INPUTS, "what reaches the parser"
    assert passed["identity"] > 0.01 * NUM_INPUTS, "what is accepted"
    assert passed["schema"] - passed["parse"] > 0.01 * NUM_INPUTS, "what the parser finds wrong"


def test_row_17_frames_that_were_once_too_much_are_survived() -> None:
    """To keep another: `mutated(NUMBER).SerializeToString()` in tests/collector/crashers, named for what is wrong."""
    result = run("frame_target:CorpusTarget", 0, len(CorpusTarget.PATHS), 1)
    assert result.faults == []
    assert result.refused.total() == len(CorpusTarget.PATHS) > 0


def test_an_input_is_that_of_its_number() -> None:
    frames = [mutated(number).SerializeToString(deterministic=True) for number in range(50)]
    assert frames == [mutated(number).SerializeToString(deterministic=True) for number in range(50)]
    assert len(set(frames)) > 45


@pytest.fixture(scope="module")
def sampled_otlp() -> Result:
    return run("otlp_target:OtlpTarget", 0, NUM_REQUESTS, 1)


def test_row_17_no_request_of_otlp_ends_the_process_or_is_stored_as_something_else(sampled_otlp: Result) -> None:
    assert sampled_otlp.faults == []
    assert sampled_otlp.refused.total() == NUM_REQUESTS
    assert 0 < sampled_otlp.max_rss_bytes < MAX_RSS_BYTES


def test_row_17_requests_of_otlp_come_past_each_check_and_are_refused_at_each(sampled_otlp: Result) -> None:
    assert set(sampled_otlp.refused) == {*OtlpTarget.CHECKS, "accepted"}
    assert sampled_otlp.refused["accepted"] > 0.2 * NUM_REQUESTS
    assert sampled_otlp.refused["message"] > 0.1 * NUM_REQUESTS, "what protobuf finds wrong"
    assert sampled_otlp.refused["json"] > 0.1 * NUM_REQUESTS


def test_what_an_sdk_sent_is_taken_as_it_is_in_both_forms() -> None:
    for kind in SIGNALS:
        binary, text = ((CORPUS / f"{kind.table}.{form}").read_bytes() for form in ("bin", "json"))
        assert normal(kind.request.FromString(from_json(kind, text))) == normal(kind.request.FromString(binary))


def test_a_request_is_that_of_its_number() -> None:
    requests = [otlp_mutated(number) for number in range(50)]
    assert requests == [otlp_mutated(number) for number in range(50)]
    assert len({request.body.data for request in requests}) > 45


class Fragile:
    """Does not survive 3 by a signal, raises at 5, and loses all that it takes."""

    CHECKS: ClassVar[tuple[str, ...]] = ("one",)

    def __init__(self, folder: Path) -> None:
        self._is_empty = True

    def take(self, number: int) -> str:
        if number == 3:
            os.kill(os.getpid(), signal.SIGSEGV)
        assert number != 5, "five is too much"
        self._is_empty = False
        return "accepted"

    def read_back(self) -> None:
        assert self._is_empty, "nothing is there"


def test_what_does_not_survive_is_told_with_its_number() -> None:
    result = run("test_fuzz:Fragile", 0, 8, 1)
    told = [
        "input 3: SIGSEGV",
        "input 5: AssertionError: five is too much",
        "input 7: AssertionError: nothing is there",
    ]
    assert result.faults == told
