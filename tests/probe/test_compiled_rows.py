"""What a graph writes: every row and stamp of every step is the oracle's, in each mode, around and around the ring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled_kit import in_mode
from torch import nn

import insitu
from insitu.testing import Recording


class Echo(nn.Module):
    """Says where a value comes from: what it returns is [step, layer, row, 1] in each row of [step, ...]."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.keep: torch.Tensor
        self.add: torch.Tensor
        self.row: torch.Tensor
        self.register_buffer("keep", torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.register_buffer("add", torch.tensor([0.0, float(layer), 0.0, 1.0]))
        self.register_buffer("row", torch.tensor([0.0, 0.0, 1.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = torch.arange(x.shape[0], device=x.device, dtype=x.dtype)[:, None]
        return x * self.keep + self.add + number * self.row


class Layer(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.mlp = Echo(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(x)
        return output


class Echoes(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(layer) for layer in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def run_echoes(recording: Recording, mode: str | None, num_steps: int) -> dict[int, tuple[int, set[int]]]:
    """Run steps of random sizes, some with rows that are wanted, some padded; return (valid rows, wanted) by step."""
    random, ran = np.random.default_rng(11), {}
    model = Echoes().eval()
    rules = [insitu.Rule(sites="L*.mlp_out", requests="opt-in")]
    with torch.inference_mode(), insitu.attach(model, to=recording, rules=rules, max_rows=16) as session:
        compiled = in_mode(model, mode, dynamic=True)
        for step in range(num_steps):
            first, second, num_padded = (int(n) for n in random.integers(1, 5, 3))
            is_wanted = bool(random.random() < 0.3)
            rows = [insitu.Rows("a", 0, first, capture=is_wanted), insitu.Rows("b", first, second)]
            x = torch.full((first + second + num_padded, 4), float(step))
            x[first + second :] = float("nan")
            with session.step(step, rows=rows, num_padded=num_padded):
                compiled(x)
            ran[step] = first + second, set(range(first)) if is_wanted and step else set()
            if step % 60 == 59:
                session.flush()
        assert session.flush().dropped == 0
    return ran


def assert_told(recording: Recording, ran: dict[int, tuple[int, set[int]]]) -> None:
    names = {row["site"]: row["name"] for row in recording.rows("sites")}
    table = recording.table("summaries").to_pydict()
    assert set(table["step_id"]) == set(ran), "a step left no stamp"
    assert len(table["step_id"]) == len(set(zip(table["step_id"], table["site"], strict=True)))
    last = max(name for name in names.values() if name.startswith("L"))
    for step, site, canary, num_rows, bad in zip(
        *(table[name] for name in ("step_id", "site", "canary", "num_rows", "nonfinite_rows")), strict=True
    ):
        n, layer = ran[step][0], int(last[1])
        assert (canary, num_rows, bad) == (n * (step + layer + 1) + n * (n - 1) / 2, n, []), (step, names[site])
    found: dict[int, set[tuple[str, int]]] = {}
    for row in recording.table("captures").to_pylist():
        layer = int(names[row["site"]][1])
        expected = [row["step_id"], layer, row["row"], 1]
        assert np.frombuffer(row["data"], np.float32).tolist() == expected, "a row of another step, site or place"
        assert row["request"] == "a"
        found.setdefault(row["step_id"], set()).add((names[row["site"]], row["row"]))
    wanted = {step: {(f"L{k}.mlp_out", row) for k in (0, 1) for row in rows} for step, (_, rows) in ran.items() if rows}
    assert found == wanted


@pytest.mark.timeout(600)  # a kernel is compiled by a C++ compiler, which takes long where much else runs
@pytest.mark.parametrize("mode", [None, "eager", pytest.param("aot_eager", marks=pytest.mark.soak), "inductor"])
def test_stamps_and_rows_are_those_of_their_step_around_the_ring(insitu_records: Recording, mode: str | None) -> None:
    num_steps = 1000 if mode == "inductor" else 600
    assert_told(insitu_records, run_echoes(insitu_records, mode, num_steps))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_not_one_stamp_in_a_hundred_thousand_steps_is_out_of_place(insitu_records: Recording) -> None:
    assert_told(insitu_records, run_echoes(insitu_records, "inductor", 100_000))


class Views(nn.Module):
    """Queries, keys and values as views of one projection, of which the model itself uses part."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.q, self.k, self.unused, self.turned = (nn.Identity() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, 6).unbind(1)
        self.unused(v)
        self.turned(v.t())
        scores: torch.Tensor = self.q(q) @ self.k(k).t()
        return scores


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", [pytest.param("aot_eager", marks=pytest.mark.soak), "inductor"])
def test_taps_of_views_and_of_values_nobody_uses_are_no_dead_code(insitu_records: Recording, mode: str) -> None:
    torch.manual_seed(0)
    model, rules = Views().eval(), [insitu.Rule(sites=name, requests="all") for name in ("q", "k", "unused")]
    xs = [torch.randn(3, 6) for _ in range(3)]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules, overhead_budget=1.0) as session:
        compiled = in_mode(model, mode)
        for x in xs:
            compiled(x)
        session.flush()
        assert session.coverage().never_fired == []
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    with torch.inference_mode():
        for step, x in list(enumerate(xs))[1:]:
            q, k, v = model.qkv(x).view(len(x), 3, 6).unbind(1)
            for name, expected in (("q", q), ("k", k), ("unused", v)):
                rows = [r for r in insitu_records.rows("captures", step_id=step) if names[r["site"]] == name]
                found = np.stack([np.frombuffer(r["data"], np.float32) for r in rows])
                assert np.allclose(found, expected.numpy(), 1e-5, 1e-6), name
