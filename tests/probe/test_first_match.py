"""Rules that overlap: the first of a kind that names a site is followed there, and one that never is, is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording

FIRST = insitu.Rule(sites="*", requests="all", rows="last")
HIDDEN = insitu.Rule(sites="0", requests="all")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()


def test_attach_says_which_rule_takes_nothing_and_the_first_is_followed(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    with insitu.attach(model, to=insitu_records, rules=[FIRST, HIDDEN], axes={"*": "tokens"}), torch.inference_mode():
        for _ in range(2):  # rows are taken once it is known how wide they are
            model(torch.ones(3, 4))
    assert caplog.messages == [
        "insitu: rule 2 (0,requests=all) takes nothing: earlier rules of its kind name all its sites"
    ]
    assert insitu_records.rows("captures")


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [HIDDEN, FIRST],
        [FIRST, insitu.Rule(sites="0", take="summary")],
        [insitu.Rule(sites="0"), insitu.Rule(sites="1")],
    ],
    ids=["none", "the narrower first", "of another kind", "of other sites"],
)
def test_of_rules_that_are_followed_nothing_is_said(
    rules: list[insitu.Rule], insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    insitu.attach(net(), to=insitu_records, rules=rules).close()
    assert not caplog.messages
