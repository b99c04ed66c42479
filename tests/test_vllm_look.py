"""What `examples/vllm_look_ahead` rests on, without vLLM: a graph that was traced once, lost its guards, was saved, and
is run by another model, as vLLM does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from insitu_vllm_look import COUNTER, Asked, Batch, Look, counters, install
from torch import Tensor, nn

WIDTH = 16
EARLY = Asked("taps", canaries=(0, 1), rows=(0,), max_rows=8, width=WIDTH)
LATE = Asked("taps", canaries=(1, 2), rows=(1,), max_rows=8, width=WIDTH)


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


class Missing(nn.Identity):
    """Of another stage."""


class Root(nn.Module):
    def __init__(self, missing: int = -1) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        if missing >= 0:
            self.layers[missing] = Missing()

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            if not isinstance(layer, Missing):
                x, residual = layer(x, residual)
        assert residual is not None
        output: Tensor = x + residual
        return output


def is_there(module: nn.Module) -> bool:
    return not isinstance(module, Missing)


def tapped(asked: Asked, missing: int = -1) -> tuple[Root, Look]:
    root = Root(missing)
    look = install(root, asked, is_there)
    assert look is not None
    return root, look


def inputs(num_rows: int) -> Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(num_rows))


def residual_after_first(x: Tensor) -> Tensor:
    root = Root()
    delta, residual = root.layers[0](x, None)
    sum_of: Tensor = delta + residual
    return sum_of


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
    at = tmp_path_factory.mktemp("cache") / "model"
    saved(tapped(EARLY)[0], at)
    return at


def batch(num_rows: int) -> Batch:
    return Batch(("0", "1"), (0, 0), (1, num_rows - 1))


@torch.inference_mode()
def test_a_saved_graph_writes_into_the_memory_of_the_model_that_runs_it(artifact: Path) -> None:
    root, look = tapped(EARLY)
    function = loaded(artifact)
    for num_rows in (5, 3, 7):
        with look.step(batch(num_rows)):
            output = function(root, inputs(num_rows))
        torch.testing.assert_close(output, Root()(inputs(num_rows)))
        torch.testing.assert_close(look.kept[2][-1], residual_after_first(inputs(num_rows)))
    assert [step["fired"] for step in look.steps] == [[0, 1, 2]] * 3
    assert [step["count"] for step in look.steps] == [[5], [3], [7]]
    assert {step["plan"] for step in look.steps} == {look.plan_number}


@torch.inference_mode()
def test_stamps_alone_do_not_tell_a_graph_of_other_taps_its_plan_does(artifact: Path) -> None:
    root, look = tapped(LATE)
    with look.step(batch(5)):
        loaded(artifact)(root, inputs(5))
    (step,) = look.steps
    assert step["fired"] == [0, 1, 2]
    assert step["plan"] == int(EARLY.plan.digest[:15], 16) != look.plan_number
    assert EARLY.digest != LATE.digest


@torch.inference_mode()
def test_outside_of_a_step_nothing_that_is_read_is_written(artifact: Path) -> None:
    root, look = tapped(EARLY)
    function = loaded(artifact)
    with look.step(batch(5)):
        function(root, inputs(5))
    before = look.memory.words[:-1].clone(), look.rows[2].values[:-1].clone()
    function(root, inputs(8))
    assert torch.equal(look.memory.words[:-1], before[0])
    assert torch.equal(look.rows[2].values[:-1], before[1])


@torch.inference_mode()
def test_eager_is_the_same(artifact: Path) -> None:
    root, look = tapped(EARLY)
    with look.step(batch(5)):
        root(inputs(5))
    assert look.steps[0]["fired"] == [0, 1, 2]
    torch.testing.assert_close(look.kept[2][0], residual_after_first(inputs(5)))


@torch.inference_mode()
def test_a_stage_stamps_the_sites_it_has() -> None:
    root, look = tapped(EARLY, missing=0)
    with look.step(batch(5)):
        root(inputs(5))
    assert look.present == (1, 2)
    assert look.steps[0]["fired"] == [1, 2]


@torch.inference_mode()
def test_the_operator_comes_back_to_python_once_a_forward() -> None:
    root, look = tapped(Asked("taps", (0,), (0,), operator=True, max_rows=8, width=WIDTH))
    for _ in range(2):
        with look.step(batch(4)):
            root(inputs(4))
    assert [step["taken"] for step in look.steps] == [1, 1]


def test_a_hook_counts_forwards_of_its_layer() -> None:
    root = Root()
    assert install(root, Asked("hook", canaries=(1,)), is_there) is None
    root(inputs(2))
    root(inputs(2))
    assert counters(root) == {1: 2}
    assert COUNTER not in dict(root.named_parameters())


def test_what_is_asked_crosses_as_text() -> None:
    asked = Asked("taps", (0, 3), (2,), operator=True, width=7, dtype="bfloat16")
    assert Asked.parse(asked.text) == asked
    assert asked.digest == Asked.parse(asked.text).digest
