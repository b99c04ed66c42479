"""Steps on a device are timed there, between two events of its stream, and the governor keeps its budget by that."""

import torch
from cuda_kit import NEEDS_CUDA
from torch import nn

import insitu
from insitu.testing import Recording

pytestmark = NEEDS_CUDA


def test_full_steps_are_taken_less_often_where_the_device_spends_more_on_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8))).cuda().half()
    x, records = torch.randn(2048, 2048, device="cuda", dtype=torch.half), Recording()
    rule = insitu.Rule(sites="*", take="summary", every=1)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    num_steps = 0
    with torch.inference_mode(), insitu.attach(net, to=records, rules=[rule], overhead_budget=0.1) as session:
        began.record()
        while True:
            for _ in range(50):
                net(x)
                num_steps += 1
            ended.record()
            torch.cuda.synchronize()
            session.flush()
            if began.elapsed_time(ended) > 10_000:
                break
        told = session.stats().governor
    assert told is not None
    factor, share = told["period_factor"], told["full_share"]
    assert factor is not None and factor > 1
    assert share is not None and share < 0.1
    assert len({row["step_id"] for row in records.rows("statistics")}) < num_steps
