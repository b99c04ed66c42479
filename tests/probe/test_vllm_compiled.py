"""Taps in a graph that somebody traces once, saves, and runs with another model, as vLLM does; with torch alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import insitu
from insitu.session.live import Session
from insitu.settled import settings
from insitu.sites.catalogue import of_sites
from insitu.sites.site import Site
from insitu.taps.attaching import observed
from insitu.testing import Recording
from insitu.vllm.compiled import FIXED, OneGraph

WIDTH = 16


class Norm(nn.Module):
    """As a norm of vLLM: adds up what it is given, and returns the sum second."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return x / 2
        total = x + residual
        return total / 2, total


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.mlp = Norm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        return torch.relu(self.mlp(x)), residual


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        assert residual is not None
        output: Tensor = x + residual
        return output


class Tapped:
    """A root with taps for the rows after some layers, and its session."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.root, self.recording = Root(), Recording()
        sites = [Site(0, f"L{n}.resid_post", f"layers.{n + 1}.input_layernorm", n, index=1) for n in layers]
        config = settings(to=self.recording, max_rows=8)
        rules = [insitu.Rule(sites="L*.resid_post")]
        self.session: Session
        self.session, self.observer = observed(
            config, self.root, rules, "rank", sites=of_sites(sites, {}), rank=0, stage=0
        )
        self.observer.learn({site.number: (WIDTH, torch.float32) for site in self.observer.plan.sites})
        self.graph = OneGraph(self.root)
        self.graph.enter(self.observer)

    @contextmanager
    def step(self, num_rows: int) -> Iterator[None]:
        """Be a step in which the second of two requests asks for its rows."""
        rows = [insitu.Rows("a", 0, 1), insitu.Rows("b", 1, num_rows - 1, capture=True)]
        with self.session.step(rows=rows, num_rows=num_rows):
            self.graph.begin()
            yield
            self.graph.end()

    def rows(self) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
        """Close, and return what was kept, by step and row."""
        self.session.close()
        found = self.recording.table("captures").to_pylist()
        return {(row["step_id"], row["row"]): np.frombuffer(row["data"], np.float32) for row in found}


def inputs(num_rows: int) -> Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows))


def residual_after_first(x: Tensor) -> Tensor:
    delta, residual = Root().layers[0](x, None)
    total: Tensor = delta + residual
    return total


def saved(root: Root, at: Path) -> None:
    """Compile the root's forward as vLLM does, without guards, and save it."""
    x = inputs(5)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.inference_mode(), torch._dynamo.config.patch(enable_aot_compile=True):
        compiled: Any = torch.compile(
            root.forward,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        compiled.aot_compile(((x,), {})).save_compiled_function(str(at))


def loaded(at: Path) -> Any:
    with at.open("rb") as file:
        function: Any = torch.compiler.load_compiled_function(file)
    function.disable_guard_check()
    return function


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with taps for the rows after layer 0."""
    at, tapped = tmp_path_factory.mktemp("cache") / "model", Tapped([0])
    saved(tapped.root, at)
    tapped.session.close()
    return at


@torch.inference_mode()
def test_a_saved_graph_writes_the_wanted_rows_into_the_memory_of_the_model_that_runs_it(artifact: Path) -> None:
    tapped, function = Tapped([0]), loaded(artifact)
    for num_rows in (5, 3, 7):
        with tapped.step(num_rows):
            output = function(tapped.root, inputs(num_rows))
        torch.testing.assert_close(output, Root()(inputs(num_rows)))
    found = tapped.rows()
    expected = {(step, row) for step, num_rows in enumerate((5, 3, 7)) for row in range(1, num_rows)}
    assert set(found) == expected
    for (step, row), values in found.items():
        wanted = residual_after_first(inputs((5, 3, 7)[step]))[row]
        np.testing.assert_allclose(values, wanted.numpy(), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_a_graph_of_other_taps_is_seen_said_once_and_nothing_of_it_is_kept(
    artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tapped, function = Tapped([1]), loaded(artifact)
    with caplog.at_level(logging.WARNING, "insitu"):
        for _ in range(2):
            with tapped.step(5):
                function(tapped.root, inputs(5))
        assert tapped.rows() == {}
    said = [record.getMessage() for record in caplog.records if "other taps" in record.getMessage()]
    assert said == ["insitu: vLLM runs a graph that was compiled for other taps; tensors are not observed"]


@torch.inference_mode()
def test_a_forward_that_belongs_to_no_step_leaves_nothing(artifact: Path) -> None:
    tapped, function = Tapped([0]), loaded(artifact)
    with tapped.step(5):
        function(tapped.root, inputs(5))
    function(tapped.root, torch.full((8, WIDTH), torch.nan))
    found = tapped.rows()
    assert {step for step, _ in found} == {0}
    assert all(np.isfinite(values).all() for values in found.values())


def test_rules_of_a_graph_cannot_change() -> None:
    tapped = Tapped([0])
    with pytest.raises(ValueError, match=FIXED):
        tapped.session.set_rules([insitu.Rule(sites="L0.resid_post", requests="all")])
    tapped.session.close()
