"""Eager CUDA: a flight recorder ships the rows it ships on the CPU, which is the oracle. Needs a CUDA device."""

from __future__ import annotations

import copy

import numpy as np
import torch
from cuda_kit import NEEDS_CUDA
from torch import nn

import insitu
from insitu.testing import Recording, expect

pytestmark = NEEDS_CUDA


def fly(net: nn.Module, x: torch.Tensor) -> Recording:
    recording, flight = Recording(), insitu.Flight(rows="*", pre_s=60)
    with (
        torch.inference_mode(),
        insitu.attach(net, to=recording, flight=flight, max_rows=16, overhead_budget=1) as session,
    ):
        for step in range(40):
            y = x.clone()
            if step == 39:
                y[4] = float("nan")
            with session.step(step, rows=[insitu.Rows("a", 0, 3, 7), insitu.Rows("b", 3, 2)], num_padded=1):
                net(y)
    return recording


def test_what_led_to_a_nan_is_shipped_from_the_device_as_from_the_host() -> None:
    torch.manual_seed(0)
    on_host = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    on_device = copy.deepcopy(on_host).cuda()
    x = torch.randn(6, 8)
    host, device = fly(on_host, x), fly(on_device, x.cuda())
    opened = expect(device.rows("incidents"), state="opened")
    assert (opened["reason"], opened["step_id"]) == ("nonfinite", 39)
    names = ("step_id", "site", "row", "request", "position", "dtype")
    expected, found = (
        sorted(([row[name] for name in names], row["data"]) for row in each.rows("captures")) for each in (host, device)
    )
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert {key[0] for key, _ in found} >= set(range(1, 40))
    for (_, got), (_, data) in zip(found, expected, strict=True):
        assert np.allclose(np.frombuffer(got, "f4"), np.frombuffer(data, "f4"), 1e-4, 1e-5, equal_nan=True)
