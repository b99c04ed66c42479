"""Limits and quotas as settings: what is written is what is meant, and a mistake is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.config import ConfigError, load
from insitu.intake import (
    LEAST_FRAME_BYTES,
    MAX_FRAME_BYTES,
    IntakeLimits,
    Quota,
    Quotas,
    limits_text,
    parse_limits,
    parse_quotas,
    quotas_text,
)

COUNTS = st.integers(1, 10**6)
QUOTAS = st.builds(
    Quota,
    bytes_per_s=st.none() | st.integers(1, 1 << 40),
    rows_per_s=st.none() | COUNTS,
    frames_per_s=st.none() | COUNTS,
    streams=COUNTS,
    in_flight=st.integers(1, 1 << 40),
)


def test_defaults_are_those_of_the_page() -> None:
    limits = IntakeLimits()
    assert (limits.streams, limits.handshake, limits.idle, limits.labels, limits.label) == (256, 5.0, 60.0, 128, 4096)
    assert (limits.in_flight, Quota().in_flight) == (256 << 20, 64 << 20)
    assert (Quota().bytes_per_s, Quota().rows_per_s) == (None, None)


def test_limits_are_read_from_a_text_and_from_a_table() -> None:
    expected = IntakeLimits(frame=4 << 20, streams=64, idle=30.0, memory=None)
    assert parse_limits("frame=4MiB, streams=64,idle=30s,memory=none") == expected
    assert parse_limits({"frame": "4MiB", "streams": 64, "idle": "30s", "memory": "none"}) == expected


def test_a_quota_may_be_one_tenants() -> None:
    quotas = parse_quotas("bytes_per_s=8MiB team-a:rows_per_s=1000,streams=2")
    assert quotas.of("team-a") == Quota(rows_per_s=1000, streams=2)
    assert quotas.of("team-b") == quotas.of("") == Quota(bytes_per_s=8 << 20)
    assert parse_quotas(["bytes_per_s=8MiB", "team-a:rows_per_s=1000,streams=2"]) == quotas


@given(
    st.builds(
        IntakeLimits,
        frame=st.integers(LEAST_FRAME_BYTES, MAX_FRAME_BYTES),
        streams=COUNTS,
        memory=st.none() | st.integers(1, 1 << 40),
        idle=st.integers(1, 10**5).map(float),
    )
)
def test_limits_are_shown_as_they_are_read(limits: IntakeLimits) -> None:
    assert parse_limits(limits_text(limits)) == limits


@given(QUOTAS, st.dictionaries(st.from_regex(r"[a-z0-9_-]{1,64}", fullmatch=True), QUOTAS, max_size=3))
def test_quotas_are_shown_as_they_are_read(others: Quota, named: dict[str, Quota]) -> None:
    quotas = Quotas(others, named)
    assert parse_quotas(quotas_text(quotas)) == quotas


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("limits", "frames=4MiB", "there is no limit 'frames'; there are frame, streams"),
        ("limits", "streams=0", "'0' is no count; write a whole number from 1"),
        ("limits", "streams=none", "streams cannot be none"),
        ("limits", "frame=64MiB", "a frame of 64MiB is not possible; write from 64KiB to 32MiB"),
        ("limits", "in_flight=1MiB", "in_flight=1MiB holds no frame of 32MiB"),
        ("limits", "much", "'much' is no limit; write it like key=value"),
        ("limits", "idle=long", "'long' is no length of time"),
        ("quotas", "bytes_per_s=lots", "'lots' is no size"),
        ("quotas", "Team A:streams=1", "is no quota"),
        ("quotas", "../up:streams=1", "'../up' is no tenant"),
        ("quotas", ":streams=1", "'' is no tenant"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(setting: str, value: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, {f"INSITU_{setting.upper()}": value})
    assert str(error.value).startswith(f"INSITU_{setting.upper()}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
