"""A session keeps its budget while the load changes, says what it did, and stores what each sample stands for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import insitu
from insitu.config import ConfigError
from insitu.overhead.account import GOVERNOR, T0_OVER
from insitu.overhead.governor import State
from insitu.rules.sampling import is_sampled
from insitu.session.live import Session
from insitu.statistics.reductions import compute
from insitu.testing import Recording

RUN = "0123456789abcdef"
MS = 1_000_000


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)


@dataclass
class Cpu:
    """CPU time that passes when the model works and when statistics are computed, and at no other time."""

    work_ns: int = 200 * MS
    statistics_ns: int = 50 * MS
    now_ns: int = 0
    thread: int = field(default_factory=get_ident)
    worked_ns: int = 0
    measured_ns: int = 0

    def read(self) -> int:
        return self.now_ns if get_ident() == self.thread else 0

    def work(self) -> None:
        self.now_ns += self.work_ns
        self.worked_ns += self.work_ns

    def measure(self) -> None:
        self.now_ns += self.statistics_ns
        self.measured_ns += self.statistics_ns


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    clock = Cpu()

    def timed(*args: Any, **kwargs: Any) -> None:
        clock.measure()
        compute(*args, **kwargs)

    monkeypatch.setattr("insitu.statistics.staging.compute", timed)  # a site of a few values waits for others
    monkeypatch.setattr(time, "thread_time_ns", clock.read)
    monkeypatch.setattr("insitu.overhead.step_costs.thread_time_ns", clock.read)
    monkeypatch.setattr("insitu.slabs.harvest.thread_time_ns", clock.read)
    return clock


class Work(nn.Module):
    """A layer whose work takes the time that the clock says."""

    def __init__(self, cpu: Cpu) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._cpu = cpu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._cpu.work()
        y: torch.Tensor = self.linear(x)
        return y


class Net(nn.Module):
    """Two layers, of which the first is no boundary: `L0.resid_post`."""

    def __init__(self, cpu: Cpu) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Work(cpu), nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def drive(session: Session, net: nn.Module, first: int, num_steps: int, look_every: int) -> int:
    """Run steps of two rows, let the drain look now and then, and return the step that comes next."""
    with torch.inference_mode():
        for step in range(first, first + num_steps):
            with session.step(step, rows=[insitu.Rows("a", start=0, count=2)], phase="decode"):
                net(torch.ones(2, 4))
            if step % look_every == 0:
                session.flush()
    session.flush()
    return first + num_steps


def governor(session: Session) -> dict[str, Any]:
    found = session.stats().governor
    assert found is not None
    return found


SUMMARY = insitu.Rule(sites="L0.resid_post", take="summary", every=2)


def test_the_budget_is_kept_while_steps_become_ten_times_shorter_and_longer_again(
    cpu: Cpu, insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """At every=2 statistics take 12.5 % of a long step and 125 % of a short one; the budget is 5 %."""
    net = Net(cpu)
    shares, factors, step = [], [], 0
    with insitu.attach(net, to=insitu_records, rules=[SUMMARY], overhead_budget=0.05) as session:
        for work_ns, num_steps, look_every in ((200 * MS, 200, 5), (20 * MS, 1500, 50), (200 * MS, 200, 5)):
            cpu.work_ns = work_ns
            step = drive(session, net, step, 4 * look_every, look_every)  # it has some windows to answer
            before = cpu.measured_ns, cpu.worked_ns
            step = drive(session, net, step, num_steps, look_every)
            shares.append((cpu.measured_ns - before[0]) / (cpu.worked_ns - before[1]))
            factors.append(governor(session)["period_factor"])
        told = governor(session)
    assert all(0 < share < 0.05 for share in shares), shares
    heavy, light, again = factors
    assert heavy == again == 4
    assert light in (32, 64), "as what every step pays, which is measured, leaves room"
    assert told["budget"] == 0.05 and told["share"] < 0.05 and told["t0_share"] < 0.02
    events = [row["text"] for row in insitu_records.rows("events", kind=GOVERNOR)]
    assert len(events) == told["adjustments"] >= 4
    first = "periods of full steps are 4 times those of the rules, after 1: at 1 the probe takes 1"  # 13 % or so
    assert events[0].startswith(first)
    assert sum("taken in one of 4 of those steps" in message for message in caplog.messages) == 1
    assert insitu_records.rows("events", kind=T0_OVER) == []


def test_what_is_sampled_at_longer_periods_is_part_of_what_the_rule_samples_and_says_what_it_stands_for(
    cpu: Cpu, insitu_records: Recording
) -> None:
    net = Net(cpu)
    with insitu.attach(net, to=insitu_records, rules=[SUMMARY], overhead_budget=0.05) as session:
        num_steps = drive(session, net, 0, 400, 5)
    rows = insitu_records.rows("sampling")
    site = next(row["site"] for row in insitu_records.rows("sites") if row["name"] == "L0.resid_post")
    measured = [row["step_id"] for row in insitu_records.rows("statistics")]
    assert [row["step_id"] for row in rows] == measured
    assert all((row["take"], row["every"], row["sites"]) == ("summary", 2, [site]) for row in rows)
    assert {row["period"] for row in rows} == {2, 8}
    assert all(is_sampled(RUN, row["step_id"], row["period"]) for row in rows)
    assert sum(row["period"] for row in rows) == pytest.approx(num_steps, rel=0.25), "the weights count the steps"
    settled = [row["step_id"] for row in rows if row["period"] == 8]
    assert settled == [step for step in range(settled[0], num_steps) if is_sampled(RUN, step, 8)]


def test_two_ranks_that_decide_apart_share_the_steps_of_the_longer_period(cpu: Cpu) -> None:
    found = []
    for work_ns in (200 * MS, 20 * MS):
        cpu.work_ns = work_ns
        records, net = Recording(), Net(cpu)
        with insitu.attach(net, to=records, rules=[SUMMARY], overhead_budget=0.05) as session:
            drive(session, net, 0, 600, 10)
        found.append({row["step_id"]: row["period"] for row in records.rows("sampling") if row["step_id"] >= 100})
    often, seldom = found
    assert seldom
    assert max(often.values()) < min(seldom.values())
    assert seldom.keys() < often.keys()


def test_where_every_step_is_full_some_become_quiet_until_the_cost_is_known(
    cpu: Cpu, insitu_records: Recording
) -> None:
    cpu.statistics_ns = MS
    net = Net(cpu)
    rule = insitu.Rule(sites="L0.resid_post", take="summary", every=1)
    with insitu.attach(net, to=insitu_records, rules=[rule], overhead_budget=0.1) as session:
        drive(session, net, 0, 100, 5)
        assert governor(session)["period_factor"] == 1
        assert governor(session)["full_share"] == pytest.approx(1 / 200, rel=0.2)
    texts = [row["text"] for row in insitu_records.rows("events", kind=GOVERNOR)]
    assert len(texts) == 2
    assert "shows only beside quiet ones" in texts[0]


def test_rows_of_everybody_are_left_out_and_those_asked_by_name_never(cpu: Cpu, insitu_records: Recording) -> None:
    net = Net(cpu)
    rule = insitu.Rule(sites="L0.resid_post", requests="all")
    with insitu.attach(net, to=insitu_records, rules=[rule], overhead_budget=0.05) as session, torch.inference_mode():
        observer = session._observer
        assert observer is not None
        net(torch.ones(2, 4))
        observer.overhead._state = State(doublings=2)
        for step in range(1, 41):
            rows = [insitu.Rows("a", start=0, count=1), insitu.Rows("b", start=1, count=1, capture=step > 20)]
            with session.step(step, rows=rows):
                net(torch.ones(2, 4))
    captured = [(row["step_id"], row["request"]) for row in insitu_records.rows("captures")]
    due = [step for step in range(1, 41) if is_sampled(RUN, step, 4)]
    assert {step for step, request in captured if request == "a"} == set(due)
    assert {step for step, request in captured if request == "b"} == {*due, *range(21, 41)}
    told = insitu_records.rows("sampling")
    assert {(row["step_id"], row["take"], row["every"], row["period"]) for row in told} == {
        (step, "rows", 1, 4) for step in due
    }


def test_t0_alone_over_the_budget_is_said_once_with_what_would_help(
    cpu: Cpu, insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net(cpu)
    with insitu.attach(net, to=insitu_records, overhead_budget=1e-9) as session:
        drive(session, net, 0, 150, 5)
        assert governor(session)["t0_share"] > 1e-9
        assert governor(session)["adjustments"] == 0
    events = insitu_records.rows("events", kind=T0_OVER)
    assert len(events) == 1
    assert 't0="boundary" (attach, INSITU_T0)' in events[0]["text"]
    assert [message for message in caplog.messages if "T0" in message] == [f"insitu: {events[0]['text']}"]


def test_where_only_boundaries_have_canaries_nothing_else_is_offered(cpu: Cpu, insitu_records: Recording) -> None:
    net = Net(cpu)
    with insitu.attach(net, to=insitu_records, overhead_budget=1e-9, t0="boundary") as session:
        drive(session, net, 0, 100, 5)
    (event,) = insitu_records.rows("events", kind=T0_OVER)
    assert "INSITU_DISABLED=1 ends it" in event["text"]


@pytest.mark.parametrize("budget", [0, 0.0, 2, -1, math.nan, math.inf, "much", True])
def test_a_budget_that_is_no_share_is_one_line_at_attach(budget: Any) -> None:
    with pytest.raises(ConfigError, match=r"^overhead_budget: .* is no share of step time") as raised:
        insitu.attach(nn.Linear(2, 2), to="memory://", overhead_budget=budget)
    assert "INSITU_DISABLED=1" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_budget_by_variable_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "0")
    with pytest.raises(ConfigError, match=r"^INSITU_OVERHEAD_BUDGET: '0' is no share"):
        insitu.attach(nn.Linear(2, 2), to="memory://")
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "0.25")
    with insitu.attach(nn.Linear(2, 2), to="memory://") as session:
        assert governor(session)["budget"] == 0.25


def test_a_real_model_whose_load_changes_tenfold_pays_no_more_than_its_budget(
    insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In CPU time of this thread, told by this test: of other processes it knows nothing."""
    monkeypatch.setattr("insitu.overhead.account.WINDOW_NS", 250 * MS)  # harder to judge by, and soon over
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=256,
    )
    model, budget, threads = LlamaModel(config).eval(), 0.1, torch.get_num_threads()
    torch.set_num_threads(1)
    rule = insitu.Rule(sites="*", take="summary", every=1)
    spent: dict[int, int] = {}
    load: dict[int, int] = {}
    factors: dict[int, int] = {}
    step = 0
    try:
        with insitu.attach(model, to=insitu_records, rules=[rule], overhead_budget=budget) as session:
            for num_tokens, step_s in ((24, 2.5), (240, 1.5), (24, 1.5)):
                ids, until_ns = torch.randint(256, (1, num_tokens)), time.thread_time_ns() + int(step_s * 1e9)
                looked_ns = time.thread_time_ns()
                while time.thread_time_ns() < until_ns:
                    began_ns = time.thread_time_ns()
                    with torch.inference_mode(), session.step(step, num_rows=num_tokens):
                        model(ids)
                    spent[step] = time.thread_time_ns() - began_ns
                    load[step] = len(factors)
                    step += 1
                    if time.thread_time_ns() - looked_ns > 0.2e9:
                        session.flush()
                        looked_ns = time.thread_time_ns()
                factors[len(factors)] = governor(session)["period_factor"]
    finally:
        torch.set_num_threads(threads)
    full = {row["step_id"] for row in insitu_records.rows("steps", variant=1)}
    shares = []
    for phase in range(3):
        steps = [step for step, of in load.items() if of == phase]
        quiet_ns = float(np.median([spent[step] for step in steps if step not in full]))
        total_ns = np.cumsum([spent[step] for step in steps])
        answered_ns = 0.7e9 if phase else 1.5e9  # a window, and a look; first three, to learn what it costs
        settled = [step for step, ns in zip(steps, total_ns, strict=True) if ns > answered_ns]
        extra_ns = sum(spent[step] - quiet_ns for step in settled if step in full)
        shares.append(extra_ns / (quiet_ns * len(settled)))
        if phase == 0:
            asked = float(np.median([spent[step] for step in steps if step in full])) / quiet_ns - 1
            assert asked > 2 * budget, "or there was nothing to govern"
    assert all(share < 1.3 * budget for share in shares), (shares, factors)
    assert all(factor > 1 for factor in factors.values())


def test_before_a_window_is_over_nothing_is_told(insitu_records: Recording) -> None:
    with insitu.attach(nn.Linear(4, 4), to=insitu_records) as session:
        session.flush()
        assert governor(session) == {
            "budget": 0.01,
            "share": None,
            "t0_share": None,
            "full_share": None,
            "period_factor": 1,
            "adjustments": 0,
        }
    assert insitu_records.rows("sampling") == []
