"""A module that is observed keeps its class, what others put in front of its forward, and its copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
from compiled_kit import Block, Stack, counting
from torch import nn

import insitu
from insitu.sites.compiled_apart import COMPILED_APART
from insitu.sites.never_fired import ENOUGH_STEPS
from insitu.testing import Recording


def doubled(module: nn.Module) -> None:
    """Put a forward of another library in front of an instance's, as accelerate does."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return 2 * inner(*args, **kwargs)

    vars(module)["forward"] = update_wrapper(partial(forward), inner)


def test_a_forward_of_another_library_is_observed_and_stays(insitu_records: Recording) -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    doubled(model.layers[2])
    theirs = vars(model.layers[2])["forward"]
    expected, logits = model(x), []
    with insitu.attach(model, to=insitu_records) as session:
        for _ in range(2):
            logits.append(model(x))
        session.flush()
        assert session.coverage().never_fired == []
    assert all(torch.equal(expected, each) for each in logits)
    assert vars(model.layers[2])["forward"] is theirs


def test_what_others_put_in_front_later_stays_and_taps_fall_silent(insitu_records: Recording) -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    with insitu.attach(model, to=insitu_records) as session:
        doubled(model.layers[0])
        doubled(model)
        observed = model(x)
        session.flush()
    num_rows = len(insitu_records.rows("summaries"))
    assert torch.equal(model(x), observed)
    assert len(insitu_records.rows("summaries")) == num_rows > 0
    again = Recording()
    with insitu.attach(model, to=again):
        assert torch.equal(model(x), observed)
    assert {row["site"] for row in again.rows("summaries")} == {row["site"] for row in insitu_records.rows("summaries")}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: saved(model)], ids=["deepcopy", "save"])
def test_a_copy_is_a_model_of_its_own(insitu_records: Recording, how: Callable[[nn.Module], nn.Module]) -> None:
    model, x = Stack().eval(), torch.randn(3, 8)
    with insitu.attach(model, to=insitu_records):
        other = how(model)
        for parameter in other.parameters():
            parameter.data.zero_()
        assert model(x).any()
        assert not other(x).any()


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    assert type(loaded) is type(model)
    return loaded


class Body(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(8) for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Headed(nn.Module):
    """Layers inside of a part, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model, self.lm_head = Body(num_layers=2), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.lm_head(self.model(x))
        return output


def wrap_layers(model: Headed, backend: Any) -> None:
    for at, layer in enumerate(model.model.layers):
        model.model.layers[at] = torch.compile(layer, backend=backend)  # type: ignore[assignment]


def compile_layers(model: Headed, backend: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend=backend)


def wrap_body(model: Headed, backend: Any) -> None:
    vars(model)["_modules"]["model"] = torch.compile(model.model, backend=backend)


def compile_body(model: Headed, backend: Any) -> None:
    model.model.compile(backend=backend)


INSIDE = {f"L{layer}.{name}" for layer in range(2) for name in ("mlp_out", "resid_post")}
OUT_OF_LAYERS = {"L0.resid_post", "L1.resid_post"}


@pytest.mark.parametrize("has_twin", [False, True], ids=["alone", "twin"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", [wrap_layers, compile_layers, wrap_body, compile_body])
def test_parts_that_are_compiled_by_themselves_run_as_before_and_what_is_not_seen_is_said(
    insitu_records: Recording, way: Callable[[Headed, Any], None], order: str, has_twin: bool
) -> None:
    torch.compiler.reset()  # models of other tests have used up the limit of this class
    model, backend, x = Headed().eval(), counting(), torch.randn(3, 8)
    with torch.inference_mode():
        expected = model(x)
        if has_twin:  # whose graphs must not be run for this one, nor this one's for it
            way(twin := copy.deepcopy(model), backend)
            twin(x)
        if order == "before":
            way(model, backend)
            model(x)
        with insitu.attach(model, to=insitu_records) as session:
            if order == "after":
                way(model, backend)
            for _ in range(ENOUGH_STEPS):
                assert torch.equal(model(x), expected)
            session.flush()
            coverage = session.coverage()
        num_rows = len(insitu_records.rows("summaries"))
        assert torch.equal(model(x), expected)
    unseen = INSIDE - (OUT_OF_LAYERS if (way, order) == (wrap_layers, "before") else set())
    assert set(coverage.never_fired) == set(coverage.compiled_apart) == unseen
    assert len(insitu_records.rows("summaries")) == num_rows > 0
    [text] = [row["text"] for row in insitu_records.rows("events") if row["kind"] == COMPILED_APART]
    assert text.startswith(f"{len(unseen)} sites are not observed, since model")
    assert text.endswith("compile the attached model as a whole, torch.compile(model)")
