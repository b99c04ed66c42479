"""What a flight recorder may be asked for, and how settings say it."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import insitu
from insitu.config import ConfigError, Origin, load
from insitu.flight.settings import LONGEST_S, Flight, FlightError, FlightRule, flight_text, parse_flight
from insitu.rules.rule import RuleError


def test_rows_arm_the_model_with_a_rule_that_is_no_other() -> None:
    rule = insitu.Flight(rows="L*.resid_post").rule
    assert isinstance(rule, FlightRule)
    assert (rule.sites, rule.take, rule.requests, rule.rows) == ("L*.resid_post", "rows", "all", "all")
    assert rule != insitu.Rule(sites="L*.resid_post", requests="all"), "a plan tells them apart"
    assert insitu.Flight().rule is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre_s": -1.0}, "pre_s=-1.0 is not known; it may be from 0 to 120 seconds"),
        ({"post_s": LONGEST_S + 1}, "post_s="),
        ({"again_after_s": float("nan")}, "again_after_s=nan"),
        ({"slow_factor": 1.0}, "slow_factor=1.0 is not known; it may be more than 1, or None"),
        ({"signal": "SIGKILL"}, "it may be SIGUSR1 or SIGUSR2"),
        ({"max_bytes": "many"}, "max_bytes='many' is no size; write it like \"64MiB\""),
        ({"max_bytes": 0}, "max_bytes=0 is no size"),
        ({"max_bytes": 10**400}, "is no size; write it like"),
        ({"pre_s": 10**400}, "it may be from 0 to 120 seconds"),
        ({"again_after_s": 10**400}, "it may be from 0 to inf seconds"),
        ({"slow_factor": 10**400}, "it may be more than 1, or None"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FlightError, match=r"^[^\n]+$") as error:
        Flight(**fields)
    assert message in str(error.value)


def test_a_glob_that_cannot_be_followed_is_refused_at_once() -> None:
    with pytest.raises(RuleError, match="the range"):
        Flight(rows="L[7-3].mlp_out")


def test_sizes_are_bytes_or_words() -> None:
    assert (Flight(max_bytes="1MiB").row_bytes, Flight(max_bytes=4096).row_bytes) == (1 << 20, 4096)
    assert Flight(signal="SIGUSR2").signal_number is signal.SIGUSR2


def test_a_setting_is_a_word_pairs_or_a_table() -> None:
    assert [parse_flight(text) for text in ("on", "1", True)] == [Flight()] * 3
    assert [parse_flight(text) for text in ("off", "0", False)] == [None] * 3
    asked = Flight(rows="L*.mlp_out", pre_s=5.0, nonfinite=False, max_bytes="8MiB")
    assert parse_flight("rows=L*.mlp_out, pre_s=5,nonfinite=false,max_bytes=8MiB") == asked
    assert parse_flight({"rows": "L*.mlp_out", "pre_s": 5.0, "nonfinite": False, "max_bytes": "8MiB"}) == asked
    for text in ("", "perhaps", "rows", "colour=red"):
        with pytest.raises(FlightError):
            parse_flight(text)


@given(
    pre_s=st.floats(0, LONGEST_S),
    post_s=st.floats(0, LONGEST_S),
    exception=st.booleans(),
    slow_factor=st.none() | st.floats(1.001, 1e6),
)
def test_pairs_say_what_arguments_say(pre_s: float, post_s: float, exception: bool, slow_factor: float | None) -> None:
    fields: dict[str, Any] = {"pre_s": pre_s, "post_s": post_s, "exception": exception, "slow_factor": slow_factor}
    given_ones = {name: value for name, value in fields.items() if value is not None}
    text = ",".join(f"{name}={str(value).lower()}" for name, value in given_ones.items())
    assert parse_flight(text) == Flight(**given_ones)


def test_the_environment_asks_for_one_and_config_says_it() -> None:
    config = load(environment={"INSITU_FLIGHT": "rows=L*.mlp_out,pre_s=3"})
    assert config.flight == Flight(rows="L*.mlp_out", pre_s=3.0)
    assert config.origin("flight") is Origin.ENVIRONMENT
    assert flight_text(config.flight) == "3 s before to 2 s after, rows of L*.mlp_out up to 64 MiB"
    assert flight_text(load(environment={}).flight) == "off"
    with pytest.raises(ConfigError, match="INSITU_FLIGHT: a flight recorder has no 'colour'"):
        load(environment={"INSITU_FLIGHT": "colour=red"})
