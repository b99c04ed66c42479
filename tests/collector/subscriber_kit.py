"""What a test of a subscriber begins with: a store, its letters, a receiver, no settings of OpenTelemetry's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from target_kit import Receiver, grpc_target

from insitu_collector.subscriber.dead import listed
from insitu_collector.subscriber.letter import Letter


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with grpc_target() as found:
        yield found


def letters(store: Path, to: str | None = None) -> list[tuple[Path, Letter]]:
    """Return the dead letters of a store (or of one destination) that are whole."""
    return [(path, found) for path, found in listed(store, to) if isinstance(found, Letter)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"
