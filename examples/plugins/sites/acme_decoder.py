"""A model of our own, and where insitu's names lie in it. How to write such a table: docs/extending.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from insitu.families import Family, Place
from insitu.site_plugins import Architecture


class AcmeAttention(nn.Module):
    """Causal attention with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True)
        output: torch.Tensor = self.out(found)
        return output


class AcmeBlock(nn.Module):
    """A layer: attention and MLP, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_a, self.attn = nn.LayerNorm(width), AcmeAttention(width)
        self.norm_m, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm_a(x))
        output: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm_m(x))))
        return output


class AcmeDecoder(nn.Module):
    """Token ids [batch, tokens] to scores of the next."""

    def __init__(self, num_layers: int = 2, width: int = 16, vocabulary: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(AcmeBlock(width) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        output: torch.Tensor = self.head(self.norm(x))
        return output


FAMILY = Family(
    "Acme decoder",
    ("AcmeBlock",),
    (
        Place("resid_pre", io="in"),
        Place("attn_in", "norm_a"),
        Place("q", "attn.q"),
        Place("k", "attn.k"),
        Place("v", "attn.v"),
        Place("attn_z", "attn.out", io="in"),
        Place("attn_out", "attn"),
        Place("resid_mid", "norm_m", io="in"),
        Place("mlp_in", "norm_m"),
        Place("mlp_act", "down", io="in"),
        Place("mlp_out", "down"),
        Place("resid_post"),
    ),
    holder="blocks",
    embed=Place("embed", "token"),
    final_norm=Place("final_norm", "norm"),
    logits=(Place("logits", "head"),),
    package="acme_decoder",
)


class AcmeSites(Architecture):
    """Where the names lie in an `AcmeDecoder`."""

    def families(self) -> Sequence[Family]:
        return (FAMILY,)

    def example(self) -> tuple[nn.Module, Mapping[str, torch.Tensor]]:
        return AcmeDecoder(), {"ids": torch.tensor([[3, 1, 4, 1, 5]])}
