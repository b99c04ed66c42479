"""Statistics of other packages on CUDA: those of the CPU, which is the oracle, without a wait. Needs a CUDA device."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_kit import NEEDS_CUDA, no_waiting
from package_kit import install
from torch import nn

import insitu
from insitu.plugins.discovery import STATISTICS
from insitu.statistic_plugins import load_measures
from insitu.testing import Recording

pytestmark = NEEDS_CUDA
CODE = (Path(__file__).parents[2] / "examples/plugins/statistic/acme_row_norm.py").read_text()


def test_a_statistic_of_another_package_is_that_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "acme_on_cuda", {STATISTICS: {"acme.row_norm": "acme_on_cuda:RowNorm"}}, CODE)
    torch.manual_seed(0)
    on_host = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).eval()
    x, found = torch.randn(6, 8), []
    for net, given in ((on_host, x), (copy.deepcopy(on_host).cuda(), x.cuda())):
        records, rules = Recording(), [insitu.Rule(sites="*", take="acme.row_norm", every=1)]
        with torch.inference_mode(), insitu.attach(net, to=records, rules=rules, overhead_budget=1) as session:
            for step in range(8):
                with session.step(step):
                    net(given)
        rows = sorted(records.rows("plugin_statistics"), key=lambda row: (row["step_id"], row["site"]))
        found.append([[value["value"] for value in row["values"]] for row in rows])
    host, device = found
    assert len(host) == 7 * 3
    assert np.allclose(device, host, 1e-5)


def test_what_the_kit_lets_pass_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "acme_on_cuda", {STATISTICS: {"acme.row_norm": "acme_on_cuda:RowNorm"}}, CODE)
    statistic, x = load_measures(["acme.row_norm"])["acme.row_norm"].statistic, torch.randn(6, 8, device="cuda")
    statistic.compute(x)
    with no_waiting():
        statistic.compute(x)
