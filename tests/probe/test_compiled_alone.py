"""What a compiled model is not to do to others, nor they to it: twins, limits, settings, threads, larger graphs."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from compiled_kit import Stack, counting, wrapped
from torch import nn

import insitu
from insitu.testing import Recording


def test_a_twin_without_taps_that_was_compiled_before_lends_no_graph(insitu_records: Recording) -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        wrapped(twin)(x)
        with insitu.attach(model, to=insitu_records) as session:
            wrapped(model)(x)
            session.flush()
            assert session.coverage().never_fired == []


@pytest.mark.parametrize(("limit", "num_models"), [(1, 3), pytest.param(8, 40, marks=pytest.mark.soak)])
def test_models_of_one_class_do_not_use_up_their_recompile_limit(limit: int, num_models: int) -> None:
    sessions, backend, x = [], counting(), torch.randn(2, 8)
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=limit):
        for _ in range(num_models):
            model = Stack(num_layers=1).eval()
            session = insitu.attach(model, to=Recording())
            wrapped(model, backend)(x)
            sessions.append(session)
        for session in sessions:
            session.flush()
            assert session.coverage().never_fired == []
            session.close()
    assert backend.frame_count == len(sessions)


def test_the_host_s_settings_and_caches_are_left_alone(insitu_records: Recording) -> None:
    bystander, backend, x = Stack().eval(), counting(), torch.randn(3, 8)
    before = torch._dynamo.config.get_config_copy()
    with torch.inference_mode():
        compiled = torch.compile(bystander, backend=backend)
        compiled(x)
        model = Stack().eval()
        with insitu.attach(model, to=insitu_records):
            torch.compile(model, backend="eager")(x)
        compiled(x)
    assert backend.frame_count == 1, "what another model had compiled is gone"
    assert torch._dynamo.config.get_config_copy() == before


def test_detached_runs_the_graph_it_had_before_and_no_tap(insitu_records: Recording) -> None:
    model, backend, x = Stack().eval(), counting(), torch.randn(3, 8)
    with torch.inference_mode():
        compiled = wrapped(model, backend)
        before = compiled(x)
        session = insitu.attach(model, to=insitu_records)
        during = compiled(x)
        session.close()
        after = compiled(x)
    assert torch.equal(before, during) and torch.equal(before, after)
    assert backend.frame_count == 2, "one without taps, one with"
    assert type(model) is Stack
    assert len(insitu_records.rows("steps")) == 1


def test_a_container_compiled_before_it_was_attached_is_a_step_too(insitu_records: Recording) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    with torch.inference_mode():
        compiled = wrapped(model)
        before = compiled(x)
        with insitu.attach(compiled, to=insitu_records) as session:
            assert torch.equal(compiled(x), before)
            session.flush()
            assert (session.coverage().never_fired, session.coverage().steps) == ([], 1)
        assert torch.equal(compiled(x), before)
    assert type(model) is nn.Sequential


def test_a_forward_of_another_thread_writes_into_no_slab(insitu_records: Recording) -> None:
    model = Stack().eval()
    with torch.inference_mode(), insitu.attach(model, to=insitu_records) as session:
        compiled = wrapped(model)
        compiled(torch.ones(2, 8))

        def beside() -> None:
            with torch.inference_mode():
                compiled(torch.full((2, 8), math.nan))

        with session.step(7):
            compiled(torch.ones(2, 8))
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()
        assert session.stats().concurrent_forward == 1
    rows = insitu_records.rows("summaries", step_id=7)
    assert rows and all(row["nonfinite_rows"] == [] and math.isfinite(row["canary"]) for row in rows)


def test_inside_a_larger_graph_a_model_is_no_step_and_breaks_nothing(insitu_records: Recording) -> None:
    model, backend = Stack().eval(), counting()

    @torch.compile(backend=backend, fullgraph=True)
    def serve(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model(insitu.tap(x * 2, "doubled")) + 1
        return output

    with torch.inference_mode(), insitu.attach(model, to=insitu_records):
        for _ in range(3):
            serve(torch.ones(2, 8))
    assert backend.frame_count == 1
    assert insitu_records.rows("steps") == []


def test_a_tap_that_cannot_be_compiled_never_reaches_the_model(
    insitu_records: Recording, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # outside pytest errors are contained
    monkeypatch.setattr("insitu.taps.graph.Sheet.write", lambda sheet: torch._dynamo.graph_break())
    with torch.inference_mode():
        expected = model(x)
        with insitu.attach(model, to=insitu_records):
            compiled = wrapped(model)
            assert all(torch.allclose(compiled(x), expected) for _ in range(3))
    assert [r.getMessage().split(";")[0] for r in caplog.records if r.name == "insitu"] == [
        "insitu: the taps failed and are switched off"
    ]
    assert len(insitu_records.rows("steps")) == 3, "steps go on"
