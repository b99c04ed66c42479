"""Forwards under a transform of torch run without taps, are said once, and leave all others observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import insitu
from insitu.session.live import Session
from insitu.testing import Recording

X = torch.linspace(-1, 1, 24).reshape(3, 8)


def small() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


def forward_mode(model: nn.Module) -> torch.Tensor:
    with forward_ad.dual_level():
        dual: Any = model(forward_ad.make_dual(X, X))  # type: ignore[no-untyped-call]
        tangent: torch.Tensor = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
        return tangent


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda model: torch.func.vmap(model)(X[None]),
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(X),
    "jvp": lambda model: torch.func.jvp(model, (X,), (X,))[1],
    "functionalize": lambda model: torch.func.functionalize(model)(X),
    "forward_ad": forward_mode,
    "trace": lambda model: torch.jit.trace(model, (X,), check_trace=False)(X),  # type: ignore[no-untyped-call]
}


def steps_of(session: Session, records: Recording) -> list[int]:
    session.flush()
    return [row["step_id"] for row in records.rows("steps")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("is_first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_it_runs_unobserved_is_said_once_and_the_next_steps_are_observed(
    way: Callable[[nn.Module], Any],
    is_first: bool,
    insitu_records: Recording,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, expected = small(), way(small())
    with insitu.attach(model, to=insitu_records) as session:
        if not is_first:
            model(X)
        for _ in range(2):
            assert torch.equal(way(model), expected)
        for _ in range(2):
            model(X)
        num_steps = 2 if is_first else 3
        assert steps_of(session, insitu_records) == list(range(num_steps))
        assert session.coverage().fired == len(session.sites())
        assert session.stats().probe_errors == 0
    assert {row["step_id"] for row in insitu_records.rows("summaries")} == set(range(num_steps))
    [said] = [row["text"] for row in insitu_records.rows("events") if row["kind"] == "forward_transformed"]
    assert [record.getMessage() for record in caplog.records if record.name == "insitu"] == [f"insitu: {said}"]


def test_an_open_step_has_none_of_it_and_what_runs_in_it_beside_is_observed(insitu_records: Recording) -> None:
    model = small()
    with insitu.attach(model, to=insitu_records) as session:
        model(X)
        with session.step():
            torch.func.vmap(model)(X[None])
        with session.step():
            torch.func.vmap(model)(X[None])
            model(X)
        assert steps_of(session, insitu_records) == [0, 1, 2]
    assert {row["step_id"] for row in insitu_records.rows("summaries")} == {0, 2}


@pytest.mark.parametrize("is_first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("way", [WAYS[name] for name in ("vmap", "jvp", "functionalize")])
def test_a_part_of_the_model_of_which_no_tap_can_write_leaves_the_taps_on(
    way: Callable[[nn.Module], Any], is_first: bool, insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    model, expected = small(), way(small()[0])  # type: ignore[index]
    with insitu.attach(model, to=insitu_records) as session:
        if not is_first:
            model(X)
        for _ in range(2):
            with session.step():
                assert torch.equal(way(model[0]), expected)  # type: ignore[index]
        for _ in range(2):
            model(X)
        num_steps = 4 if is_first else 5
        assert steps_of(session, insitu_records) == list(range(num_steps))
        assert session.coverage().fired == len(session.sites())
        assert session.stats().probe_errors == 0
    whole = [2, 3] if is_first else [0, 3, 4]
    assert [row["step_id"] for row in insitu_records.rows("summaries")] == whole
    [said] = [row["text"] for row in insitu_records.rows("events") if row["kind"] == "forward_transformed"]
    assert [record.getMessage() for record in caplog.records if record.name == "insitu"] == [f"insitu: {said}"]


def test_a_compiled_model_too(insitu_records: Recording) -> None:
    torch.compiler.reset()
    model = small()
    expected = torch.func.vmap(model)(X[None])
    with insitu.attach(model, to=insitu_records) as session, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        compiled(X)
        assert torch.equal(torch.func.vmap(compiled)(X[None]), expected)
        compiled(X)
        assert steps_of(session, insitu_records) == [0, 1]
        assert session.stats().probe_errors == 0
    assert {row["step_id"] for row in insitu_records.rows("summaries")} == {0, 1}
