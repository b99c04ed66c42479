"""A test kit for what is built on insitu: a memory exporter, an oracle model, and sentences to expect.

Shipped as a pytest plugin: the fixture `insitu_records` gives a `Recording` to pass as `to=`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from insitu.exporters.base import Ack, Batch, Level
from insitu.records import schema_of
from insitu.vocabulary import DropReason

if TYPE_CHECKING:
    import torch


class Recording:
    """An exporter that keeps every batch; pass it as `to=`. At once durable."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._durable: dict[int, int] = {}

    def export(self, batch: Batch) -> Ack:
        self.batches.append(batch)
        self._durable[batch.stream] = batch.seq
        return Ack(batch.stream, batch.seq, Level.DURABLE)

    def durable(self, stream: int) -> int:
        return self._durable.get(stream, -1)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        return []

    def flush(self, timeout_s: float) -> bool:
        return True

    def close(self, timeout_s: float) -> None:
        return None

    def table(self, name: str) -> pa.Table:
        """Return every row of a table, in the order they were shipped."""
        batches = [batch.data for batch in self.batches if batch.table == name]
        return pa.Table.from_batches(batches, schema_of(name))

    def rows(self, name: str, **where: Any) -> list[dict[str, Any]]:
        """Return the rows of a table whose columns equal `where`."""
        rows: list[dict[str, Any]] = self.table(name).to_pylist()
        return [row for row in rows if all(row[column] == value for column, value in where.items())]


def expect(rows: list[dict[str, Any]], **columns: Any) -> dict[str, Any]:
    """Assert that exactly one row has these columns, and return it; the message lists what there was."""
    found = [row for row in rows if all(row[column] == value for column, value in columns.items())]
    assert len(found) == 1, f"expected one row with {columns}, found {len(found)} among {rows[:8]}"
    return found[0]


def oracle_values(layer: int, num_rows: int, width: int) -> torch.Tensor:
    """Return what layer `layer` of the oracle model adds: value = 1000 * layer + row, shape [num_rows, width]."""
    import torch

    return (1000.0 * layer + torch.arange(num_rows, dtype=torch.float32))[:, None].expand(num_rows, width)


def oracle_model(num_layers: int = 3, width: int = 4) -> Any:
    """Return a module with paths `model.layers.N.{self_attn,mlp}` whose outputs say where they come from.

    The output of `LN.mlp_out` is `oracle_values(N, rows, width)`, whatever the input.
    """
    import torch
    from torch import nn

    class Constant(nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return oracle_values(self.layer, x.reshape(-1, width).shape[0], width).reshape(x.shape) + 0 * x

    class Layer(nn.Module):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.self_attn = nn.Identity()
            self.mlp = Constant(layer)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.mlp(self.self_attn(x))
            return output

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(layer) for layer in range(num_layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    class Oracle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.model(x)
            return output

    return Oracle()


@pytest.fixture
def insitu_records() -> Recording:
    """A fresh `Recording`."""
    return Recording()
