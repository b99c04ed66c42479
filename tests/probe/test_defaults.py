"""What a program has for its default dtype and device is its own affair: what is recorded stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording

TABLES = ("summaries", "captures", "statistics")
OWN = ("epoch", "row_seq")
RULES = [insitu.Rule(sites="*", requests="all"), insitu.Rule(sites="*", take="summary", every=1)]


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def observed(mode: str | None, dtype: torch.dtype, device: str) -> dict[str, list[dict[str, Any]]]:
    """Return what is recorded of six steps, in order, by table."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    xs, records = torch.randn(6, 5, 8) * 1.2345, Recording()
    xs[4, 2, 1] = float("nan")
    with defaults(dtype, device), torch.inference_mode(), insitu.attach(net, to=records, rules=RULES) as session:
        called: Any = net if mode is None else torch.compile(net, backend=mode, fullgraph=True)
        for x in xs:
            called(x)
            session.flush()
        assert session.stats().probe_errors == 0
    return {name: [{k: v for k, v in row.items() if k not in OWN} for row in records.rows(name)] for name in TABLES}


@pytest.mark.parametrize("mode", [None, "eager"])
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")], ids=str
)
def test_the_same_is_recorded(
    mode: str | None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_RUN", "0123456789abcdef")
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")
    expected, found = observed(mode, torch.float32, "cpu"), observed(mode, dtype, device)
    assert all(expected[name] for name in TABLES)
    for name in TABLES:
        assert repr(found[name]) == repr(expected[name]), name  # NaN equals NaN
