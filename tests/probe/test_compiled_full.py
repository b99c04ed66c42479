"""Full steps of compiled models: statistics, rows in each form and counts of experts are what eager has of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from compiled_kit import Stack, counting, wrapped
from package_kit import install
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import insitu
from insitu.plugins.discovery import STATISTICS
from insitu.rules.sampling import is_sampled
from insitu.testing import Recording

RUN = "0123456789abcdef"
_OF_THE_PROCESS = {"epoch", "row_seq"}


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)


def observe(model: nn.Module, rules: Sequence[insitu.Rule], backend: Any) -> Recording:
    """Run 40 steps of few sizes, one of three padded, of which some rows are wanted; not compiled without a backend."""
    recording, random = Recording(), torch.Generator().manual_seed(4)
    with torch.inference_mode(), insitu.attach(model, to=recording, rules=rules, overhead_budget=1.0) as session:
        called = model if backend is None else wrapped(model, backend)
        with session.step(next(n for n in range(99, 200) if not is_sampled(RUN, n, 4))):
            called(
                torch.zeros(2, 8)
            )  # statistics that are due in the first step would be dropped: rows have no memory yet
        for step in range(40):
            n, num_padded = 2 + step % 4, step % 3 // 2
            x = torch.randn(n + num_padded, 8, generator=random)
            x[n:] = float("nan")
            rows = [insitu.Rows("a", 0, n - 1, capture=step % 2 == 1), insitu.Rows("b", n - 1, 1)]
            with session.step(step, rows=rows, num_padded=num_padded):
                called(x)
            if step % 8 == 7:  # a drain that a busy machine keeps waiting would leave steps without a place
                session.flush()
        assert session.flush().dropped == 0
    return recording


def told(recording: Recording, table: str) -> list[dict[str, Any]]:
    """Return the rows of a table, without what differs from process to process, by step and site."""
    rows = [{k: v for k, v in row.items() if k not in _OF_THE_PROCESS} for row in recording.rows(table)]
    return sorted(rows, key=lambda row: (row["step_id"], row["site"], row.get("row", 0)))


RULES = {
    "statistics": [insitu.Rule(sites="*", take="summary", every=4)],
    "rows": [insitu.Rule(sites="L*.resid_post"), insitu.Rule(sites="L*.mlp_out", rows="last")],
    "rows in other forms": [
        insitu.Rule(sites="L0.resid_post", cast="bf16"),
        insitu.Rule(sites="L1.resid_post", topk=3),
        insitu.Rule(sites="L0.mlp_out", cast="fp8", topk=2),
    ],
    "both": [insitu.Rule(sites="*", take="summary", every=4), insitu.Rule(sites="L1.resid_post")],
}


@pytest.mark.parametrize("name", RULES)
def test_a_full_graph_takes_what_eager_takes(name: str) -> None:
    model = Stack().eval()
    expected = observe(copy.deepcopy(model), RULES[name], None)
    found = observe(model, RULES[name], "eager")
    for table in ("statistics", "captures"):
        rows = told(expected, table)
        assert str(told(found, table)) == str(rows), table  # as text, in which NaN is NaN
        assert bool(rows) == ((table == "captures") == name.startswith("rows") or name == "both")
    variants = [(row["step_id"], row["variant"]) for row in expected.rows("steps")]
    assert [(row["step_id"], row["variant"]) for row in found.rows("steps")] == variants


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_full_graph_of_kernels_takes_what_eager_takes() -> None:
    model = Stack().eval()
    expected = observe(copy.deepcopy(model), RULES["both"], None)
    found = observe(model, RULES["both"], "inductor")
    for table, column in (("statistics", "num_values"), ("captures", "request")):
        assert [row[column] for row in told(found, table)] == [row[column] for row in told(expected, table)]
    for got, row in zip(told(found, "statistics"), told(expected, "statistics"), strict=True):
        assert got["absmax"] == pytest.approx(row["absmax"], rel=1e-5)
        assert got["mean"] == pytest.approx(row["mean"], rel=1e-4, abs=1e-6)


CODE = """
from insitu.statistic_plugins import Statistic

class Largest(Statistic):
    fields = ("largest",)

    def compute(self, x):
        return x.double().amax().reshape(1)
"""


def test_statistics_of_other_packages_are_taken_in_a_graph(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "largest_rows", {STATISTICS: {"acme.largest": "largest_rows:Largest"}}, CODE)
    model, rules = Stack().eval(), [insitu.Rule(sites="L*.resid_post", take="acme.largest", every=2)]
    expected = observe(copy.deepcopy(model), rules, None)
    found = observe(model, rules, "eager")
    assert told(expected, "plugin_statistics")
    assert told(found, "plugin_statistics") == told(expected, "plugin_statistics")


def test_rules_that_change_make_one_graph_each_and_none_when_they_are_in_force_again(
    insitu_records: Recording,
) -> None:
    model, backend, x = Stack().eval(), counting(), torch.ones(3, 8)
    first, second = (insitu.Rule(sites=f"L{k}.resid_post", requests="all") for k in (0, 1))
    counts = []
    with (
        torch.inference_mode(),
        insitu.attach(model, to=insitu_records, rules=[first], overhead_budget=1.0) as session,
    ):
        compiled = wrapped(model, backend)
        for rules in (None, [second], [], [second]):
            if rules is not None:
                session.set_rules(rules)
            for _ in range(3):
                compiled(x)
            counts.append(backend.frame_count)
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    steps: dict[str, set[int]] = {}
    for row in insitu_records.rows("captures"):
        steps.setdefault(names[row["site"]], set()).add(row["step_id"])
    assert steps == {"L0.resid_post": {1, 2}, "L1.resid_post": {3, 4, 5, 9, 10, 11}}
    assert counts == [2, 3, 3, 4], "quiet, one for each set of rules for rows, none for no rule"


def test_rows_of_another_width_than_in_the_first_step_are_said_and_not_made_up(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.turn(x.t())
            return output

    model = Turned().eval()
    rules = [insitu.Rule(sites="turn", requests="all")]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules, overhead_budget=1.0):
        compiled = wrapped(model)
        with caplog.at_level(logging.WARNING, "insitu"):
            for n in (3, 3, 4, 5, 3):
                compiled(torch.ones(n, 2))
    assert {row["step_id"] for row in insitu_records.rows("captures")} == {1}
    said = [record.getMessage() for record in caplog.records if record.name == "insitu"]
    assert said == ["insitu: no rows of turn: they turned out to have 4 values"]


def test_a_full_step_without_wanted_rows_leaves_those_of_the_step_before(insitu_records: Recording) -> None:
    model = Stack().eval()
    rules = [insitu.Rule(sites="L1.resid_post"), insitu.Rule(sites="*", take="summary", every=1)]
    with (
        torch.inference_mode(),
        insitu.attach(model, to=insitu_records, rules=rules, overhead_budget=1.0) as session,
    ):
        compiled = wrapped(model)
        for step in range(3):  # the first shows what there is, the second compiles
            with session.step(step, rows=[insitu.Rows("a", 0, 2, capture=step == 1)]):
                compiled(torch.full((2, 8), float(step)))
            if not step:
                session.flush()
        x = torch.ones(2, 8)
        for layer in model.layers[:2]:
            x = layer(x)
    found = [np.frombuffer(row["data"], np.float32) for row in insitu_records.rows("captures")]
    assert np.array_equal(np.stack(found), x.numpy())


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_experts_are_counted_in_a_graph() -> None:
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts_per_tok=2,
        num_local_experts=6,
    )
    model: nn.Module = MixtralForCausalLM(config).eval()
    found = []
    for compiles in (False, True):
        recording, each = Recording(), copy.deepcopy(model)
        random = torch.Generator().manual_seed(5)
        with torch.inference_mode(), insitu.attach(each, to=recording) as session:
            called: Any = torch.compile(each, backend="eager") if compiles else each
            for step in range(40):
                with session.step(step):
                    called(torch.randint(32, (2, 3), generator=random), use_cache=False)
        found.append(told(recording, "expert_loads"))
    assert found[0] and found[0] == found[1]
