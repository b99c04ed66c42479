"""A test kit for what is built on insitu, shipped as a pytest plugin: what a probe recorded, and sentences to expect.

    def test_my_server_tells_its_steps(insitu_records):
        with insitu.attach(model, to=insitu_records):
            model(x)
        expect(insitu_records).every_row_once().steps(1)

Every pytest in this environment imports this module, so it imports nothing: torch and Arrow come with the first fixture
or name that is used. `docs/extending.md` has an example of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from insitu.check_exporter import check_exporter
    from insitu.plugins.check_sites import check_architecture
    from insitu.plugins.check_statistic import check_statistic
    from insitu.testing.fake_clock import FakeClock
    from insitu.testing.oracle import Origin, oracle_model, oracle_values, origin_of
    from insitu.testing.recording import Recording
    from insitu.testing.sentences import Sentences, expect

__all__ = [
    "FakeClock",
    "Origin",
    "Recording",
    "Sentences",
    "check_architecture",
    "check_exporter",
    "check_statistic",
    "expect",
    "oracle_model",
    "oracle_values",
    "origin_of",
]

_HOMES = {
    "FakeClock": "insitu.testing.fake_clock",
    "Recording": "insitu.testing.recording",
    "check_architecture": "insitu.plugins.check_sites",
    "check_exporter": "insitu.check_exporter",
    "check_statistic": "insitu.plugins.check_statistic",
    **dict.fromkeys(("Sentences", "expect"), "insitu.testing.sentences"),
    **dict.fromkeys(("Origin", "oracle_model", "oracle_values", "origin_of"), "insitu.testing.oracle"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'insitu.testing' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


@pytest.fixture
def insitu_records() -> Recording:
    """An exporter that keeps what is recorded, to pass as `to=`."""
    from insitu.testing.recording import Recording

    return Recording()


@pytest.fixture
def insitu_clock() -> FakeClock:
    """A clock that goes on when it is told to."""
    from insitu.testing.fake_clock import FakeClock

    return FakeClock()


@pytest.fixture
def insitu_oracle() -> Any:
    """A model whose tensors say of which site, layer, step and row they are. Skips where there is no torch."""
    pytest.importorskip("torch")
    from insitu.testing.oracle import oracle_model

    return oracle_model()


@pytest.fixture
def insitu_contains() -> Iterator[None]:
    """Errors of the probe and of plug-ins are contained in this test, as they are outside of pytest."""
    from insitu.guard import containing

    with containing():
        yield
