"""Whatever part of the probe fails, the model answers as without it, the next steps run, and the account adds up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording

PARTS = [
    "taps.observer.Observer.begin",
    "taps.observer.Observer.finish",
    "taps.observer.Observer.end",
    "taps.observer.Observer.harvest",
    "taps.observer.Observer.silent_sites",
    "taps.observer.read_steps",
    "taps.observer.summarise",
    "taps.observer.captured",
    "taps.observer.measured",
    "slabs.slab.Ring.take",
    "taps.eager.Taps._take_boundary",
    "taps.eager.Taps._take_full",
    "slabs.rows.RowArea.take",
    "slabs.rows.Destinations.aim",
    "rules.in_force.InForce.choose_rows",
    "rules.in_force.InForce.note_rows",
    "rules.changes.RuleChanges.turn",
    "statistics.taps.StatisticTaps.take",
    "statistics.taps.StatisticTaps.finish",
    "overhead.account.Overhead.begin",
    "overhead.account.Overhead.take",
    "overhead.account.Overhead.look",
    "drain.builders.summaries",
    "drain.builders.captures",
    "drain.builders.intervals",
    "drain.builders.from_rows",
    "drain.builders.batch",
    "drain.health.reading",
    "flight.recorder.FlightRecorder.look",
    "sites.never_fired.NeverFired.look",
    "drain.outbox.Outbox.ship",
]
"""What runs in a step, or over one, by its place in the package."""


def net_of(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).eval()


def fail(*_: object, **__: object) -> None:
    raise LookupError("this part is broken")


@pytest.mark.usefixtures("insitu_contains")
@pytest.mark.parametrize("part", PARTS)
def test_an_error_of_any_part_reaches_no_request_and_every_row_is_accounted_for(
    part: str, insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = net_of(4), torch.randn(3, 4)
    rules = [insitu.Rule(sites="*"), insitu.Rule(sites="*", take="summary", every=1)]
    rows = [insitu.Rows("a", 0, 3, capture=True)]
    with torch.inference_mode():
        expected = net(x)
        session = insitu.attach(net, to=insitu_records, rules=rules, overhead_budget=1.0)

        def step() -> torch.Tensor:
            with session.step(rows=rows):
                return net(x)  # type: ignore[no-any-return]

        outputs = [step() for _ in range(3)]
        session.flush()
        with monkeypatch.context() as broken:
            broken.setattr(f"insitu.{part}", fail)
            outputs += [step() for _ in range(3)]
            session.flush()
        outputs += [step() for _ in range(3)]
        report = session.close()
    assert all(torch.equal(output, expected) for output in outputs)
    stats = session.stats()
    assert stats.probe_errors > 0, "the error is counted"
    assert report.pending == 0
    for table, produced in stats.produced.items():
        dropped = sum(stats.dropped.get(table, {}).values())
        assert produced == stats.durable.get(table, 0) + dropped == len(insitu_records.rows(table)) + dropped, table
    assert len(insitu_records.rows("steps")) + sum(stats.dropped.get("steps", {}).values()) == 9
    assert type(net) is nn.Sequential


@pytest.mark.usefixtures("insitu_contains")
@pytest.mark.parametrize(
    "part",
    [
        "flight.recorder.FlightRecorder.look",
        "flight.recorder.FlightRecorder.finish",
        "taps.observer.Observer.harvest",
        "drain.health.reading",
        "drain.builders.statistics",
    ],
)
def test_what_fails_until_the_end_leaves_no_row_uncounted(
    part: str, insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = net_of(4), torch.randn(3, 4)
    monkeypatch.setenv("INSITU_MAX_QUEUE_BYTES", "1MiB")  # one step is read at a time
    monkeypatch.setattr(f"insitu.{part}", fail)
    rules = [insitu.Rule(sites="*", requests="all"), insitu.Rule(sites="*", take="summary", every=1)]
    with torch.inference_mode():
        session = insitu.attach(net, to=insitu_records, rules=rules, overhead_budget=1.0)
        for _ in range(12):
            net(x)
        report = session.close()
    stats = session.stats()
    assert stats.probe_errors > 0 and report.pending == 0
    assert len(insitu_records.rows("steps")) == stats.num_steps + 12 * (part == "taps.observer.Observer.harvest") == 12
    for table, produced in stats.produced.items():
        assert produced == stats.durable.get(table, 0) + sum(stats.dropped.get(table, {}).values()), table
    others = {"summaries", "captures", "intervals"} if "harvest" not in part else {"intervals"}
    assert all(insitu_records.rows(table) for table in others), "the other parts go on"
