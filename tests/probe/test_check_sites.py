"""The kit for sites lets a right table pass, and each kind of wrong one is told what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from insitu.families import Family, Place
from insitu.plugins.discovery import Broken, NotChecked
from insitu.site_plugins import Architecture
from insitu.testing import check_architecture


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.spare = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = x + self.mix(self.norm(x))
        return output


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Embedding(8, 4), nn.Hardtanh(-0.1, 0.1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 8)

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        x = self.scale(self.token(ids))
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "states": (x,)}


FAMILY = Family(
    "Test",
    ("Block",),
    (Place("resid_pre", io="in"), Place("attn_in", "norm"), Place("attn_out", "mix"), Place("resid_post")),
    "blocks",
    embed=Place("embed", "scale"),
    final_norm=None,
    logits=(Place("logits", "head"),),
    absent={"final_norm": "no norm stands after the last layer"},
    package=Block.__module__,
)


def architecture(model: nn.Module | None, **changes: Any) -> Architecture:
    class Sites(Architecture):
        def families(self) -> Sequence[Family]:
            return (replace(FAMILY, **changes),)

        def example(self) -> tuple[nn.Module, Mapping[str, Any]] | None:
            return None if model is None else (model, {"ids": torch.tensor([[1, 2, 3]])})

    return Sites()


def test_a_right_table_passes() -> None:
    assert check_architecture(architecture(Net())) == (
        "10 sites of a Net fired, 1 said why not; its output is the same bits"
    )


class Restless(Net):
    num_calls = 0

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        self.num_calls += 1
        return {"logits": super().forward(ids)["logits"] + self.num_calls}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_key_value_heads=2, **sizes))
    return model


PLACES = FAMILY.places


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            Net(),
            {"places": (*PLACES, Place("mlp_out", "gone"))},
            r"L0\.mlp_out lies nowhere: .*no module blocks\.0\.gone",
        ),
        (Net(), {"places": (*PLACES, Place("mlp_out", "spare"))}, r"never fired: L0\.mlp_out, L1\.mlp_out"),
        (Net(), {"places": (*PLACES, Place("gate", "mix"))}, "has the names gate; those with a meaning"),
        (
            Net(),
            {"places": (*PLACES, Place("q", "mix", index=7, io="in"))},
            r"(never fired|no rows could be taken of):? L0\.q",
        ),
        (Net(), {"embed": Place("embed", "token")}, "embed is not what the first layer is given"),
        (Net(), {"layers": ("Layer",)}, "no list of layers in a Net holds a .*Layer; its modules are"),
        (Restless(), {}, "other bits while it is observed"),
        (llama(), {}, "insitu knows the layers of a LlamaForCausalLM by itself"),
    ],
)
def test_a_wrong_table_is_told_what_is_wrong(model: nn.Module, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Broken, match=message):
        check_architecture(architecture(model, **changes))


def test_without_a_model_it_is_not_checked() -> None:
    with pytest.raises(NotChecked, match="names no model"):
        check_architecture(architecture(None))


def test_a_table_without_families_tells_nothing() -> None:
    class Empty(Architecture):
        pass

    with pytest.raises(Broken, match="no family"):
        check_architecture(Empty())
