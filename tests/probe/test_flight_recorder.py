"""What was not shipped comes with its incident: found in the step, bounded, once, and never in the model's way."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from exporter_kit import Hanging
from torch import nn
from wait_kit import until

import insitu
from insitu import Flight
from insitu.flight.settings import LONGEST_S
from insitu.testing import Recording, expect, oracle_model, oracle_values
from insitu.vocabulary import Variant
from insitu.wire.insitu_pb2 import Dump


def poison(model: nn.Module, layer: int) -> None:
    """Run one step in which what a layer's MLP is given holds a NaN in row 1."""

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1, 2] = float("nan")
        return output

    layers: Any = model.get_submodule("model.layers")
    handle = layers[layer].self_attn.register_forward_hook(hook)
    model(torch.zeros(3, 4))
    handle.remove()


def names_of(records: Recording) -> dict[int, str]:
    return {row["site"]: row["name"] for row in records.rows("sites")}


def account_is_whole(session: insitu.Session, records: Recording) -> bool:
    """Tell whether each row that was produced was stored, with numbers without a gap, or dropped under a reason."""
    stats = session.stats()
    return all(
        produced == len(records.rows(table)) + sum(stats.dropped.get(table, {}).values())
        for table, produced in stats.produced.items()
    ) and [row["row_seq"] for row in records.rows("captures")] == list(range(stats.produced.get("captures", 0)))


def test_a_nan_ships_the_rows_of_the_steps_before_it(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=4, width=4)
    flight = Flight(rows="L*.mlp_out", pre_s=30)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, rank=3, stage=1, flight=flight) as session:
        for _ in range(20):
            model(torch.zeros(3, 4))
        poison(model, 2)
        model(torch.zeros(3, 4))
    opened = expect(insitu_records.rows("incidents"), state="opened")
    told = [opened[name] for name in ("reason", "step_id", "site", "on_rank", "on_stage", "rank")]
    assert told == ["nonfinite", 20, "L2.mlp_out", 3, 1, 3]
    captures = insitu_records.rows("captures")
    steps = {row["step_id"] for row in captures}
    assert {*range(1, 21)} <= steps <= {*range(1, 22)}, "step 0 tells how wide rows are; the window ends with the run"
    names = names_of(insitu_records)
    for row in captures:
        values, layer = np.frombuffer(row["data"], np.float32), int(names[row["site"]][1])
        expected = oracle_values("mlp_out", layer, row["step_id"], 3, 4)[row["row"]].numpy().copy()
        if row["step_id"] == 20 and row["row"] == 1 and layer == 2:
            expected[2] = float("nan")
            assert np.array_equal(values, expected, equal_nan=True)
        elif not (row["step_id"] == 20 and row["row"] == 1 and layer > 2):
            assert values.tolist() == expected.tolist(), row
    answered = expect(insitu_records.rows("incidents"), state="answered")
    assert answered["incident"] == opened["incident"]
    assert (answered["num_captures"], answered["num_full_steps"]) == (len(captures), len(steps))
    assert (answered["first_step_id"], answered["last_step_id"]) == (0, max(steps)), "canaries from the first on"
    assert account_is_whole(session, insitu_records)


def test_what_began_before_the_window_stays_where_it_is(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=3, width=4)
    flight = Flight(rows="L*.mlp_out", pre_s=0, post_s=0)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=flight) as session:
        for _ in range(5):
            model(torch.zeros(3, 4))
        poison(model, 1)
        model(torch.zeros(3, 4))
        session.flush()
        assert {row["step_id"] for row in insitu_records.rows("captures")} == {5}, "the step itself is always in it"
        held = session.stats().flight["row_bytes"]
        session.dump("again")
    assert held > 0
    assert {row["step_id"] for row in insitu_records.rows("captures")} == {5}
    assert account_is_whole(session, insitu_records)


def test_a_collector_that_asks_for_too_much_holds_no_memory_for_ever(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=2, width=4)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight(rows="L*.mlp_out")) as session:
        for _ in range(3):
            model(torch.zeros(3, 4))
        now = time.time_ns()
        session._flight.asked(
            Dump(incident="aa", reason="asked", start_unix_ns=0, end_unix_ns=2**63, trigger_unix_ns=now)
        )
        session.flush()
        (incident,) = session._flight._open
        assert incident.t1_ns - time.monotonic_ns() <= LONGEST_S * 1e9
    answered = expect(insitu_records.rows("incidents"))
    told = [answered[name] for name in ("state", "incident", "on_rank", "step_id", "first_step_id")]
    assert told == ["answered", "aa", None, None, 0], "opened by somebody else"


def test_canaries_of_every_site_come_too_and_none_twice(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=3, width=4)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight()) as session:
        for _ in range(5):
            model(torch.zeros(3, 4))
        poison(model, 1)
        num_sites = len(session.sites())
    summaries = insitu_records.rows("summaries")
    assert len(summaries) == len({(row["step_id"], row["site"]) for row in summaries}) == 6 * num_sites
    answered = expect(insitu_records.rows("incidents"), state="answered")
    num_boundaries = sum(row["num_rows"] is not None for row in summaries if row["step_id"] == 4)
    assert answered["num_summaries"] == 5 * (num_sites - num_boundaries), "of the flagged step all were told anyway"
    assert answered["num_captures"] == 0
    assert account_is_whole(session, insitu_records)


def test_without_a_trigger_nothing_more_is_shipped_and_armed_steps_are_full(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=3, width=4)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight(rows="L*.mlp_out")) as session:
        for _ in range(30):
            model(torch.zeros(3, 4))
        session.flush()
        held = session.stats().flight
    assert held["row_bytes"] > 0
    assert held["t0_bytes"] > 0
    assert insitu_records.rows("captures") == insitu_records.rows("incidents") == []
    assert not session.stats().produced["captures"]
    variants = [row["variant"] for row in insitu_records.rows("steps")]
    assert variants == [Variant.QUIET, *[Variant.FULL] * 29]


def test_a_session_that_was_given_none_ships_canaries_when_it_is_asked(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=3, width=4)
    with torch.no_grad(), insitu.attach(model, to=insitu_records) as session:
        for _ in range(4):
            model(torch.zeros(3, 4))
        poison(model, 1)
        assert session.flush().pending == 0
        assert insitu_records.rows("incidents") == [], "a NaN triggers nothing that nobody asked for"
        name = session.dump("a look")
        num_sites = len(session.sites())
    opened = expect(insitu_records.rows("incidents"), state="opened")
    assert (opened["incident"], opened["reason"], opened["text"]) == (name, "asked", "a look")
    assert len({row["site"] for row in insitu_records.rows("summaries", step_id=0)}) == num_sites


def test_rows_are_named_by_the_row_map_of_their_step(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=2, width=4)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight(rows="L0.mlp_out")) as session:
        model(torch.zeros(5, 4))
        with session.step(7, rows=[insitu.Rows("a", 0, 2, position=30), insitu.Rows("b", 2, 1)], num_padded=2):
            model(torch.zeros(5, 4))
        with session.step(8):
            model(torch.zeros(2, 4))
        session.dump("whose")
    found = [(row["step_id"], row["row"], row["request"], row["position"]) for row in insitu_records.rows("captures")]
    assert found == [(7, 0, "a", 30), (7, 1, "a", 31), (7, 2, "b", 0), (8, 0, None, -1), (8, 1, None, -1)]


def test_memory_stays_within_its_bound_in_a_long_run_and_the_newest_is_there(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=2, width=64)
    flight = Flight(rows="L*.mlp_out", max_bytes="256KiB", pre_s=60)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=flight, max_rows=16) as session:
        for _ in range(20):
            for _ in range(50):
                model(torch.zeros(8, 64))
            session.coverage()  # the drain takes what is there
            held = session.stats().flight
            assert held["row_bytes"] <= held["row_peak_bytes"] <= held["row_max_bytes"] == 256 << 10
        session.dump("how far back")
    steps = {row["step_id"] for row in insitu_records.rows("captures")}
    assert max(steps) == 999
    assert 1 < len(steps) <= (256 << 10) // (2 * 8 * 64 * 4), "no more than can be held"
    assert held["row_peak_bytes"] > (256 << 10) * 3 / 4, "and not much less"
    answered = expect(insitu_records.rows("incidents"), state="answered")
    assert answered["rows_since_unix_ns"] > answered["since_unix_ns"], "canaries reach further back than rows"
    assert account_is_whole(session, insitu_records)


def test_a_trigger_while_one_is_open_is_told_there(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=3, width=4)
    flight = Flight(rows="L*.mlp_out", post_s=60)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=flight) as session:
        for _ in range(3):
            model(torch.zeros(3, 4))
        name = session.dump("first")
        until(lambda: insitu_records.rows("incidents"))
        poison(model, 1)
        assert session.dump("second") == name
        session.flush()
        model(torch.zeros(3, 4))
        assert session.stats().flight["num_suppressed"] == 2
    rows = insitu_records.rows("incidents")
    assert [(row["state"], row["incident"]) for row in rows] == [("opened", name), ("answered", name)]
    assert sorted(rows[1]["further"]) == ["asked at step 3: second", "nonfinite at step 3: L1.mlp_out"]
    assert {row["step_id"] for row in insitu_records.rows("captures")} == {1, 2, 3, 4}, "and what came after it"


def test_of_one_reason_there_is_one_in_a_while_and_the_others_are_counted(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=3, width=4)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight(post_s=0)) as session:
        model(torch.zeros(3, 4))
        assert session.dump("one") is not None
        assert session.dump("two") is None
        for _ in range(5):
            poison(model, 1)
            session.flush()
    reasons = [row["reason"] for row in insitu_records.rows("incidents", state="opened")]
    assert sorted(reasons) == ["asked", "nonfinite"]
    assert session.stats().flight["num_suppressed"] == 1 + 4


def test_an_exception_leaves_the_model_untouched_and_its_words_unwritten(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=2, width=4)
    error = LookupError("the user said so")

    def fail(module: nn.Module, args: object) -> None:
        raise error

    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight(rows="L0.mlp_out")) as session:
        for _ in range(3):
            model(torch.zeros(3, 4))
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(LookupError) as raised:
            model(torch.zeros(3, 4))
        handle.remove()
        assert raised.value is error
        assert error.__cause__ is error.__context__ is None
        with pytest.raises(KeyboardInterrupt), session.step():
            raise KeyboardInterrupt
    opened = expect(insitu_records.rows("incidents"), state="opened")
    assert (opened["reason"], opened["text"], opened["step_id"]) == ("exception", "LookupError", 3)
    assert {row["step_id"] for row in insitu_records.rows("captures")} == {1, 2, 3}, "layer 0 of the last one ran"


def test_a_signal_opens_one_and_whoever_listened_before_still_hears_it(insitu_records: Recording) -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        listening = signal.getsignal(signal.SIGUSR1)
        model = oracle_model(num_layers=2, width=4)
        with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight(signal="SIGUSR1")):
            model(torch.zeros(3, 4))
            os.kill(os.getpid(), signal.SIGUSR1)
            until(lambda: insitu_records.rows("incidents"))
        assert signal.getsignal(signal.SIGUSR1) is listening
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    opened = expect(insitu_records.rows("incidents"), state="opened")
    assert (opened["reason"], opened["text"]) == ("signal", "SIGUSR1")


def test_a_step_that_takes_far_longer_than_its_like_opens_one(insitu_records: Recording) -> None:
    never = threading.Event()

    def hold(module: nn.Module, args: object) -> None:
        never.wait(0.5)

    model = oracle_model(num_layers=2, width=4)
    flight = Flight(slow_factor=3, post_s=0, again_after_s=0)
    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=flight) as session:
        for _ in range(150):
            model(torch.zeros(3, 4))
        session.flush()
        handle = model.model.layers[1].register_forward_pre_hook(hold)
        model(torch.zeros(3, 4))
        handle.remove()
    opened = {row["step_id"]: row for row in insitu_records.rows("incidents", state="opened")}
    assert 150 in opened, "others may be slow too where the machine is busy"
    assert "is the limit for its shape" in opened[150]["text"]
    assert opened[150]["reason"] == "slow_step"


def test_rows_for_which_there_was_no_slab_are_missed_and_not_dropped() -> None:
    model = oracle_model(num_layers=2, width=4)
    flight = Flight(rows="L*.mlp_out")
    records = Hanging()
    records.let_go.set()
    with torch.no_grad(), insitu.attach(model, to=records, flight=flight, max_rows=8) as session:
        model(torch.zeros(3, 4))
        session.flush()
        records.let_go.clear()
        assert records.is_hanging.wait(20), "the drain is away: nobody frees a slab"
        for _ in range(600):
            model(torch.zeros(3, 4))
        records.let_go.set()
        session.flush()
        session.dump("how many")
    answered = expect(records.rows("incidents"), state="answered")
    assert answered["num_steps_without_rows"] > 0
    assert "captures" not in session.stats().dropped
    assert account_is_whole(session, records)


def test_a_site_whose_rows_a_rule_takes_stays_that_rules(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    model = oracle_model(num_layers=2, width=4)
    rule = insitu.Rule(sites="L0.mlp_out", requests="all", rows="last")
    with (
        caplog.at_level(logging.WARNING, "insitu"),
        torch.no_grad(),
        insitu.attach(model, to=insitu_records, rules=[rule], flight=Flight(rows="L*.mlp_out")) as session,
    ):
        for _ in range(3):
            with session.step(rows=[insitu.Rows("a", 0, 3)]):
                model(torch.zeros(3, 4))
        session.flush()
        names = names_of(insitu_records)
        assert {(names[row["site"]], row["row"]) for row in insitu_records.rows("captures")} == {("L0.mlp_out", 2)}
        session.dump("the rest")
    assert "no rows for the flight recorder of L0.mlp_out: a rule takes them" in caplog.text
    rows = [(names[row["site"]], row["row"]) for row in insitu_records.rows("captures")]
    assert sorted(set(rows)) == [("L0.mlp_out", 2), ("L1.mlp_out", 0), ("L1.mlp_out", 1), ("L1.mlp_out", 2)]
    assert len(rows) == 2 + 2 * 3


def test_rules_that_change_meanwhile_leave_what_is_armed_alone(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=2, width=4)

    def run(session: insitu.Session) -> None:
        for _ in range(3):
            with session.step(rows=[insitu.Rows("a", 0, 3)]):
                model(torch.zeros(3, 4))

    with torch.no_grad(), insitu.attach(model, to=insitu_records, flight=Flight(rows="L*.mlp_out")) as session:
        run(session)
        session.set_rules([insitu.Rule(sites="L0.attn_out", requests="all", rows="last")])
        run(session)
        session.set_rules([insitu.Rule(sites="L0.mlp_out", requests="all", rows="last")])
        run(session)
        session.dump("all of it")
    names = names_of(insitu_records)
    found: dict[str, set[tuple[int, int]]] = {}
    for row in insitu_records.rows("captures"):
        found.setdefault(names[row["site"]], set()).add((row["step_id"], row["row"]))
    held = {(step, row) for step in range(1, 9) for row in range(3)}
    assert found["L1.mlp_out"] == held
    assert found["L0.attn_out"] == {(step, 2) for step in (3, 4, 5)}
    assert found["L0.mlp_out"] == {(s, row) for s, row in held if s < 6} | {(s, 2) for s in (6, 7, 8)}
    assert account_is_whole(session, insitu_records)


def test_rows_of_a_compiled_model_are_held_as_of_an_eager_one(insitu_records: Recording) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.second(torch.relu(self.first(x)))
            return output

    torch.manual_seed(0)
    net = Net().eval()
    compiled = torch.compile(net, backend="aot_eager")
    inputs = torch.randn(6, 4, 8)
    inputs[5, 2] = float("nan")
    with torch.no_grad():
        expected = [net.first(x) for x in inputs]
        with insitu.attach(net, to=insitu_records, flight=Flight(rows="module:first"), max_rows=16) as session:
            for x in inputs:
                compiled(x)
    assert expect(insitu_records.rows("incidents"), state="opened")["step_id"] == 5
    rows = insitu_records.rows("captures")
    assert {(row["step_id"], row["row"]) for row in rows} == {(step, row) for step in range(1, 6) for row in range(4)}
    for row in rows:
        values = torch.from_numpy(np.frombuffer(row["data"], np.float32).copy())
        assert torch.allclose(values, expected[row["step_id"]][row["row"]], equal_nan=True)
    assert account_is_whole(session, insitu_records)


def test_a_glob_that_names_no_site_is_an_error_that_lists_the_nearest(insitu_records: Recording) -> None:
    with pytest.raises(ValueError, match="mlp_out"):
        insitu.attach(oracle_model(), to=insitu_records, flight=Flight(rows="L*.mlp_ouT"))


def test_a_silent_session_dumps_nothing() -> None:
    assert insitu.off().dump("why") is None
