"""Rows on CUDA are kept in the forms that the host keeps them in, also while rules change. Needs a CUDA device."""

from __future__ import annotations

import torch
from cuda_kit import NEEDS_CUDA
from torch import nn

import insitu
from insitu.testing import Recording

pytestmark = NEEDS_CUDA

RULES = (
    insitu.Rule(sites="output", cast="bf16", rows="last"),
    insitu.Rule(sites="output", cast="fp8", requests="all"),
    insitu.Rule(sites="output", topk=5, cast="fp16"),
    insitu.Rule(sites="output", requests=0.5, phase="decode"),
)


def rows_of(device: str) -> list[dict[str, object]]:
    torch.manual_seed(0)
    recording, net = Recording(), nn.Sequential(nn.Identity())
    net.register_buffer("where", torch.zeros(1))  # says on which device the model is
    net.to(device)
    values = [torch.randn(6, 32) * 40 for _ in range(48)]
    with torch.inference_mode(), insitu.attach(net, to=recording, max_rows=16, overhead_budget=1) as session:
        for step, x in enumerate(values):
            if step % 6 == 1:
                session.set_rules([RULES[step // 6 % 4]])
            rows = [
                insitu.Rows("a", 0, 3, position=step, phase="decode", capture=True),
                insitu.Rows(f"b{step}", 3, 2, phase="decode"),
            ]
            with session.step(step, rows=rows, num_padded=1):
                net(x.to(device))
    return [
        {name: row[name] for name in ("step_id", "request", "row", "position", "dtype", "shape", "data")}
        for row in sorted(recording.rows("captures"), key=lambda row: (row["step_id"], row["row"]))
    ]


def test_rows_of_a_device_are_those_of_the_host() -> None:
    host = rows_of("cpu")
    assert {row["dtype"] for row in host} == {"bfloat16", "float8_e4m3fn", "float16+int32", "float32"}
    assert rows_of("cuda") == host
