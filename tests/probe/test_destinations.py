"""A session has one destination: several, and what is none, are one line at attach, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.config import ConfigError, load
from insitu.destinations import one_destination, scheme_of
from insitu.testing import Recording

hosts = st.from_regex(r"[a-z][a-z0-9]{0,8}(:[1-9][0-9]{0,3})?(/[a-z0-9.,=]{0,8})?", fullmatch=True)
urls = st.builds("{}://{}".format, st.sampled_from(["grpc", "file", "otlp", "acme+x"]), hosts)


@given(urls)
def test_one_url_is_one(url: str) -> None:
    assert one_destination(url) == url


@given(st.lists(urls, min_size=2, max_size=4), st.sampled_from([",", " ", ", ", ";", "\n"]))
def test_several_are_several_however_they_are_written(several: list[str], between: str) -> None:
    for given_as in (between.join(several), several, tuple(several)):
        with pytest.raises(ValueError, match=f"are {len(several)} destinations, and a session has one") as raised:
            one_destination(given_as)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("other", [5, Path("store"), ["otlp://a"], object()])
def test_what_is_neither_a_url_nor_an_exporter_is_said(other: Any) -> None:
    with pytest.raises(ValueError, match=r"is no destination; write a URL like file://"):
        one_destination(other)


def test_attach_refuses_a_second_one_and_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"^to: otlp://a:4317 and grpc://b:4317 are 2 destinations"):
        insitu.attach(net, to="otlp://a:4317,grpc://b:4317")
    monkeypatch.setenv("INSITU_TO", "otlp://a otlp://b")
    with pytest.raises(ConfigError, match=r"^INSITU_TO: otlp://a and otlp://b are 2 destinations"):
        insitu.attach(net)
    assert type(net) is nn.Linear


@pytest.mark.parametrize("to", ["otlp://h:4317", "OTLP://h:4317", "Otlp://h"])
def test_a_scheme_is_the_same_in_capitals(to: str) -> None:
    assert scheme_of(to) == "otlp"
    assert load(environment={"OTEL_SDK_DISABLED": "true"}, to=to).disabled


@pytest.mark.parametrize("to", ["store", "", "//[", Recording(), None])
def test_what_is_no_url_has_no_scheme(to: Any) -> None:
    assert scheme_of(to) == ""


def test_an_exporter_of_ones_own_goes_through() -> None:
    recording = Recording()
    assert load(to=recording).to is recording
