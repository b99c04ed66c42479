"""Fault specs: what they mean, and how they are refused."""

from __future__ import annotations

import json
import os
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_engine.inject import (
    FAULTS_VARIABLE,
    LOG_VARIABLE,
    Fault,
    check_faults,
    forget_faults,
    inherited_faults,
    parse_fault,
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("slow-stage=1:25", Fault(kind="slow_stage", stage=1, ms=25, start_s=5)),
        ("slow-stage=0:2.5@0-9.5", Fault(kind="slow_stage", stage=0, ms=2.5, start_s=0, end_s=9.5)),
        ("nan=6:120", Fault(kind="nan", layer=6, step=120)),
        ("gc=1", Fault(kind="gc", rank=1, start_s=5)),
        ("gc=1@2", Fault(kind="gc", rank=1, start_s=2)),
        ("hang=0:10", Fault(kind="hang", rank=0, step=10, ms=6000)),
        ("hang=0:10:7.5@3", Fault(kind="hang", rank=0, step=10, ms=7500, start_s=3)),
    ],
)
def test_what_a_spec_means(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    "text",
    [
        "",
        "slow",
        "slow-stage",
        "slow-stage=",
        "slow-stage=1",
        "slow-stage=1:0",
        "slow-stage=a:5",
        "nan=1",
        "nan=1:x",
        "gc=",
        "gc=-1",
        "gc=1:2",
        "hang=1",
        "hang=1:2:3:4",
        "gc=1@9-2",
        "gc=1@.",
        "fire=1",
        "nan=1:2@",
        "random",
        "none",
    ],
)
def test_anything_else_is_refused_in_one_line_with_the_form(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_fault(text)
    assert "\n" not in str(caught.value)
    assert repr(text) in str(caught.value)


@given(st.text(max_size=20))
def test_no_text_breaks_the_parser(text: str) -> None:
    with suppress(ValueError):
        assert isinstance(parse_fault(text), Fault)


def test_a_rank_reads_what_it_inherits() -> None:
    environ = {FAULTS_VARIABLE: json.dumps(["gc=0", "nan=1:2"])}
    assert inherited_faults(environ) == [parse_fault("gc=0"), parse_fault("nan=1:2")]
    assert inherited_faults({}) == []
    with pytest.raises(ValueError, match="JSON list"):
        inherited_faults({FAULTS_VARIABLE: '"gc=0"'})


def test_the_driver_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, '["gc=0"]')
    monkeypatch.setenv(LOG_VARIABLE, "somewhere")
    forget_faults()
    assert FAULTS_VARIABLE not in os.environ
    assert LOG_VARIABLE not in os.environ


@pytest.mark.parametrize(("spec", "named"), [("gc=2", "rank 2"), ("slow-stage=5:1", "stage 5"), ("nan=8:1", "layer 8")])
def test_a_place_that_is_not_there_is_named(spec: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_faults([parse_fault(spec)], num_stages=2, num_layers=8)
    check_faults([parse_fault("gc=1"), parse_fault("nan=7:1")], num_stages=2, num_layers=8)
