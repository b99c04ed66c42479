"""A model whose tensors say where they come from: what a probe takes of it is right or wrong by itself."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import nn

SITES: Final = ("attn_out", "mlp_out", "resid_post")
"""What a layer of it has, in order of execution."""
MAX_ROWS: Final = 64
MAX_LAYERS: Final = 16
MAX_STEPS: Final = 4096
"""Row, layer and step that a float32 can tell apart: its integers are exact up to 2^24."""


class Origin(NamedTuple):
    """Where a value comes from: the site's name without its layer, layer, step and row, counted from 0."""

    site: str
    layer: int
    step: int
    row: int


def origin_of(value: float) -> Origin:
    """Return where a value of the oracle model comes from. Raises ValueError for any other."""
    number = int(value)
    rest, row = divmod(number, MAX_ROWS)
    rest, site = divmod(rest, len(SITES) + 1)
    step, layer = divmod(rest, MAX_LAYERS)
    if number != value or not site or not 0 <= step < MAX_STEPS:
        raise ValueError(f"{value} is no value of the oracle model")
    return Origin(SITES[site - 1], layer, step, row)


def oracle_values(site: str, layer: int, step: int, num_rows: int, width: int) -> torch.Tensor:
    """Return what a site of the oracle model has in a step, float32 [num_rows, width]: each row its own number.

    site: a name of `SITES`; layer and step are counted from 0. Raises ValueError for what it cannot tell apart.
    """
    if not (0 < num_rows <= MAX_ROWS and layer < MAX_LAYERS and step < MAX_STEPS):
        raise ValueError(f"the oracle tells {MAX_ROWS} rows, {MAX_LAYERS} layers, {MAX_STEPS} steps apart, no more")
    first = ((step * MAX_LAYERS + layer) * (len(SITES) + 1) + SITES.index(site) + 1) * MAX_ROWS
    return (first + torch.arange(num_rows, dtype=torch.float32))[:, None].expand(num_rows, width)


class Says(nn.Module):
    """Returns what says its site, layer, step and row, whatever it is given, but that NaN goes through."""

    def __init__(self, oracle: list[int], site: str, layer: int) -> None:
        super().__init__()
        self._oracle, self._site, self._layer = oracle, site, layer
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = oracle_values(self._site, self._layer, self._oracle[0], x.numel() // x.shape[-1], x.shape[-1])
        return values.to(x.device).reshape(x.shape) + 0 * x


class Layer(nn.Module):
    """A layer with modules called as in most decoders, `self_attn` and `mlp`."""

    def __init__(self, oracle: list[int], layer: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Says(oracle, "attn_out", layer), Says(oracle, "mlp_out", layer)
        self.last = Says(oracle, "resid_post", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.mlp(self.self_attn(x)))
        return output


class Inner(nn.Module):
    """The layers, one after the other."""

    def __init__(self, oracle: list[int], num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(oracle, layer) for layer in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Oracle(nn.Module):
    """See `oracle_model`."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self._step, self._next, self._width = [0], 0, width
        self.model = Inner(self._step, num_layers)

    @property
    def step(self) -> int:
        """What the values of the last forward say."""
        return self._step[0]

    def say_next(self, step: int) -> None:
        """Let the next forward be this step, and those after it count on."""
        self._next = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self._width:
            raise ValueError(f"this oracle takes rows of {self._width} values, not of {x.shape[-1]}")
        self._step[0], self._next = self._next, self._next + 1
        output: torch.Tensor = self.model(x)
        return output


def oracle_model(num_layers: int = 3, width: int = 4) -> Any:
    """Return a module with paths `model.layers.N.{self_attn,mlp}` whose outputs say where they come from.

    It has num_layers layers, is given float32 [..., rows, width], and raises ValueError for another width. `origin_of`
    reads each number: site, layer, step (its forwards, counted from 0, unless `say_next` told another) and row. A NaN
    that goes in comes out.
    """
    return Oracle(num_layers, width)
