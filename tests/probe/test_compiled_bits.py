"""Outputs attached and detached, where a compiler runs the model: the same bits, or it is said that they may differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compiled_kit import in_mode
from small_models import CASES, IDS, Case
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import insitu
from insitu.testing import Recording, expect

DENSE = [case for case in CASES if case.inputs is IDS and "Moe" not in case.layer and "Mixtral" not in case.layer]
"""Experts are a loop over what a router chose, which no compiler has in one graph."""
SIZES = (2, 2, 3, 4)


def llama(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: nn.Module = LlamaForCausalLM(config).to(dtype).eval()
    return model


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("eager", torch.float32),
        pytest.param("aot_eager", torch.float32, marks=pytest.mark.soak),
        pytest.param("inductor", torch.bfloat16, marks=pytest.mark.soak),
        pytest.param("inductor", torch.float32, marks=pytest.mark.soak),
    ],
)
def test_outputs_are_the_same_bits_attached_and_detached(
    insitu_records: Recording, mode: str, dtype: torch.dtype
) -> None:
    bare = llama(dtype)
    model = copy.deepcopy(bare)
    batches = [torch.randint(48, (n, 5)) for n in SIZES]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=[insitu.Rule(sites="L*.resid_post")]):
        plain, observed = (in_mode(each, mode, dynamic=True) for each in (bare, model))
        for batch in batches:
            ids = {"input_ids": batch, "use_cache": False}
            assert torch.equal(plain(**ids).logits, observed(**ids).logits)
    assert len({row["step_id"] for row in insitu_records.rows("summaries")}) == len(batches)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", DENSE, ids=lambda case: f"{case.layer}-{len(case.absent)}")
def test_in_float32_inductor_keeps_the_bits_of_each_architecture(insitu_records: Recording, case: Case) -> None:
    torch._dynamo.reset()  # all architectures share wrappers, which Dynamo compiles for eight models and no more
    torch.manual_seed(3)
    bare = case.make().eval()
    model = copy.deepcopy(bare)
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=[insitu.Rule(sites="*.resid_post")]):
        plain, observed = (torch.compile(each, backend="inductor", dynamic=True) for each in (bare, model))
        for size in SIZES:
            given = {name: torch.cat([ids, ids])[:size] for name, ids in case.inputs.items()}
            for found, expected in zip(observed(**given).to_tuple(), plain(**given).to_tuple(), strict=True):
                assert not isinstance(expected, torch.Tensor) or torch.equal(found, expected)


def test_a_graph_with_taps_has_the_inputs_of_the_model_by_the_same_names(insitu_records: Recording) -> None:
    """Dynamo makes constants of floats by such names, for all models that it compiles: by others, of other floats."""
    graphs: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(
            {node.target for node in graph.graph.nodes if node.op == "placeholder" and "_modules_" in node.target}
        )
        return graph

    bare, ids = llama(torch.float32), {"input_ids": torch.randint(48, (2, 5)), "use_cache": False}
    model = copy.deepcopy(bare)
    with torch.inference_mode(), insitu.attach(model, to=insitu_records):
        for each in (bare, model):
            torch.compile(each, backend=backend, fullgraph=True, dynamic=True)(**ids)
    assert graphs[0] and graphs[0] == graphs[1]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_compiler_that_fuses_may_round_otherwise_and_it_is_said(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {"input_ids": torch.randint(48, (2, 5)), "use_cache": False}
    for mode in ("eager", "aot_eager", "inductor"):
        expect(insitu_records).no_row("events", kind="compiled_fused")
        model = llama(torch.float32)
        with torch.inference_mode(), insitu.attach(model, to=insitu_records):
            in_mode(model, mode, dynamic=True)(**ids)
    text = expect(insitu_records).row("events", kind="compiled_fused")["text"]
    assert "outputs may differ in their last bits" in text and text in caplog.text
