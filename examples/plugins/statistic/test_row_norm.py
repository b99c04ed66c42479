"""The statistic keeps its contract, and tells what torch says of the same rows."""

import torch
from acme_row_norm import RowNorm
from torch import nn

import insitu
from insitu.testing import Recording, check_statistic, expect


def test_it_keeps_the_contract() -> None:
    assert "parts add up" in check_statistic(RowNorm())


def test_it_tells_the_norms_of_a_step(insitu_records: Recording) -> None:
    model, x = nn.Sequential(nn.Identity()), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    rules = [insitu.Rule(sites="0", take="acme.row_norm", every=1)]
    with insitu.attach(model, to=insitu_records, rules=rules):
        for _ in range(2):  # it is tried after the first step, and taken from the second on
            model(x)
    row = expect(insitu_records).row("plugin_statistics", statistic="acme.row_norm")
    told = {each["field"]: each["value"] for each in row["values"]}
    assert told == {"num": 2.0, "mean": 3.0, "m2": 8.0, "least": 1.0, "greatest": 5.0}
