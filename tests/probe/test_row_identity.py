"""A row is its request's, at its position, whatever a scheduler does: reused slots, chunks, prefixes, pauses, drafts.

What a row holds says of which request, position and step it is, as real rows do: a map that is off by one is seen.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import insitu
from insitu.testing import Recording

SEEN = (
    "steps run",
    "new",
    "prefix hit",
    "chunk",
    "decode",
    "draft",
    "rejected",
    "paused",
    "aborted",
    "finished",
    "moved",
)
"""What a scheduler is to have done before a test of it means anything."""


class Marks(nn.Module):
    """Writes its number into the last value of each row: [request, position, step, number]."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.keep: torch.Tensor
        self.add: torch.Tensor
        self.register_buffer("keep", torch.tensor([1.0, 1.0, 1.0, 0.0]))
        self.register_buffer("add", torch.tensor([0.0, 0.0, 0.0, float(number)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.keep + self.add


class Layer(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.mlp = Marks(number)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(x)
        return output


class Decoder(nn.Module):
    """Two layers over all rows, and a head over those that sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number) for number in range(2))
        self.lm_head = Marks(9)

    def forward(self, x: torch.Tensor, sampling: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        output: torch.Tensor = self.lm_head(x[sampling])
        return output


@dataclass
class Request:
    number: int
    num_prompt: int
    num_all: int
    at: int
    """Positions that are computed."""
    wants: bool
    slot: int = -1

    @property
    def name(self) -> str:
        return f"r{self.number}"


class Entry(NamedTuple):
    request: Request
    first: int
    num_rows: int
    samples: bool


class Scheduler:
    """Fills steps as servers do, drawn from a seed; `did` counts what it did."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._live: list[Request] = []
        self._num_requests = 0
        self.did: Counter[str] = Counter()

    def step(self) -> list[Entry]:
        """Return what runs now, in the order of its rows."""
        while len(self._live) < 6 and self._chance(0.6):
            self._live.append(self._admit())
        if self._live and self._chance(0.04):
            self._live.pop(self._random.randrange(len(self._live)))
            self.did["aborted"] += 1
        if self._chance(0.2):
            self._random.shuffle(self._live)
        running = [request for request in self._live if not self._pauses(request)]
        entries = [self._entry(request) for request in running]
        for slot, entry in enumerate(entries):
            self.did["moved"] += entry.request.slot not in (-1, slot)
            entry.request.slot = slot
        self.did["finished"] += sum(request.at >= request.num_all for request in self._live)
        self._live = [request for request in self._live if request.at < request.num_all]
        self.did["steps run"] += bool(entries)
        return entries

    def _chance(self, share: float) -> bool:
        return self._random.random() < share

    def _admit(self) -> Request:
        self._num_requests += 1
        num_prompt = self._random.randint(1, 9)
        hit = self._random.randrange(num_prompt) if self._chance(0.4) else 0
        self.did["new"] += 1
        self.did["prefix hit"] += hit > 0
        num_all = num_prompt + self._random.randint(1, 12)
        return Request(self._num_requests, num_prompt, num_all, hit, self._chance(0.5))

    def _pauses(self, request: Request) -> bool:
        """Preempt a request: it loses what was computed, and begins again in a later step."""
        if not self._chance(0.03):
            return False
        request.at = 0
        self.did["paused"] += 1
        return True

    def _entry(self, request: Request) -> Entry:
        first = request.at
        if first < request.num_prompt:
            count = min(self._random.randint(1, 4), request.num_prompt - first)
            request.at += count
            self.did["chunk"] += 1
            return Entry(request, first, count, request.at == request.num_prompt)
        drafts = self._random.randint(1, 3) if self._chance(0.3) else 0
        kept = self._random.randint(0, drafts)
        request.at += 1 + kept
        self.did["decode"] += 1
        self.did["draft"] += drafts > 0
        self.did["rejected"] += kept < drafts
        return Entry(request, first, 1 + drafts, True)


def laid_out(entries: Sequence[Entry], step: int, num_padded: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return the rows of a step, which of them sample (at least two: the last is padding), and the row map."""
    rows, values, sampling = list[insitu.Rows](), list[list[float]](), list[int]()
    for request, first, count, samples in entries:
        sample_row = len(sampling) if samples else -1
        rows.append(insitu.Rows(request.name, len(values), count, first, None, sample_row, request.wants))
        values += [[request.number, first + at, step, 0] for at in range(count)]
        sampling += [len(values) - 1] if samples else []
    values += [[float("nan")] * 4] * num_padded
    padding = [len(values) - 1] * max(1, 2 - len(sampling))
    return torch.tensor(values, dtype=torch.float32), torch.tensor(sampling + padding), rows


def ran(entries: Sequence[Entry], step: int) -> set[tuple[Any, ...]]:
    """Return (site, step, request, position, row) of each row that is wanted."""
    found, row, sample_row = set[tuple[Any, ...]](), 0, 0
    for request, first, count, samples in entries:
        if request.wants:
            for at in range(count):
                found |= {(f"L{layer}.mlp_out", step, request.name, first + at, row + at) for layer in range(2)}
            if samples:
                found.add(("logits", step, request.name, first + count - 1, sample_row))
        row += count
        sample_row += samples
    return found


@pytest.mark.parametrize("mode", [None, "eager"])
def test_rows_stay_those_of_their_request_while_slots_are_reused_chunked_and_reordered(
    insitu_records: Recording, mode: str | None
) -> None:
    scheduler, model, wanted = Scheduler(5), Decoder().eval(), set[tuple[Any, ...]]()
    rules = [insitu.Rule(sites="L*.mlp_out"), insitu.Rule(sites="logits")]
    options: dict[str, Any] = {"axes": {"logits": "samples"}, "overhead_budget": 1.0, "max_rows": 32}
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules, **options) as session:
        called: Any = model if mode is None else torch.compile(model, backend=mode, fullgraph=True, dynamic=True)
        for step in range(300):
            entries = scheduler.step()
            if not entries:
                continue
            x, sampling, rows = laid_out(entries, step, 2 + step % 3)
            with session.step(step, rows=rows, num_padded=2 + step % 3):
                called(x, sampling)
            wanted |= ran(entries, step) if scheduler.did["steps run"] > 1 else set()  # the first tells widths
            if step % 40 == 39:
                session.flush()
        assert session.flush().dropped == 0
    assert all(scheduler.did[what] > 4 for what in SEEN), scheduler.did
    assert read(insitu_records) == wanted
    bad = [row["step_id"] for row in insitu_records.rows("summaries") if row["nonfinite_rows"]]
    assert bad == [], "padding was looked at"


def read(recording: Recording) -> set[tuple[Any, ...]]:
    """Return (site, step, request, position, row) of each captured row, after a look at what it holds."""
    sites, found = {row["site"]: row["name"] for row in recording.rows("sites")}, []
    for row in recording.rows("captures"):
        name = sites[row["site"]]
        number = 9 if name == "logits" else int(name[1])
        says = [int(row["request"][1:]), row["position"], row["step_id"], number]
        assert np.frombuffer(row["data"], np.float32).tolist() == says, f"{name} of {row['request']}"
        found.append((name, row["step_id"], row["request"], row["position"], row["row"]))
    assert len(found) == len(set(found)), "a row was stored twice"
    return set(found)


def llama() -> Any:
    torch.manual_seed(5)
    shape = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()


def test_left_padded_rows_are_those_of_each_prompt_run_alone(insitu_records: Recording) -> None:
    """A batch of `transformers`: rows of padding before a prompt, and of one that has ended, are nobody's."""
    prompts = {"a": [3, 9, 4, 1, 7], "b": [5, 6], "c": [2, 8, 8, 1]}
    model, longest = llama(), 5
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts.values()])
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts.values()])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    lengths = [len(p) for p in prompts.values()]
    prefill = [
        insitu.Rows(name, at * longest + longest - n, n, 0, "prefill", capture=True)
        for at, (name, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    decode = [insitu.Rows(name, at, 1, lengths[at], "decode", capture=True) for at, name in ((0, "a"), (2, "c"))]
    rules = [insitu.Rule(sites="L0.resid_post")]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules) as session:
        model(ids, use_cache=False)  # tells widths
        with session.step(1, rows=prefill):
            out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
        with session.step(2, rows=decode):
            model(
                torch.full((3, 1), 11),
                attention_mask=mask,
                position_ids=torch.tensor(lengths)[:, None],
                past_key_values=out.past_key_values,
            )
    found: dict[str, dict[int, np.ndarray[Any, Any]]] = {}
    for row in insitu_records.rows("captures"):
        assert row["position"] not in found.setdefault(row["request"], {})
        found[row["request"]][row["position"]] = np.frombuffer(row["data"], np.float32)
    for name, prompt in prompts.items():
        tokens = torch.tensor([[*prompt, 11]])
        with torch.inference_mode():
            alone = model(tokens, output_hidden_states=True, use_cache=False).hidden_states[1][0].numpy()
        assert sorted(found[name]) == list(range(len(prompt) + (name != "b")))
        for position, values in found[name].items():
            assert np.allclose(values, alone[position], 1e-4, 1e-5), (name, position)


def rows_of(recording: Recording, step: int) -> list[tuple[str, int, list[float]]]:
    rows = recording.rows("captures", step_id=step)
    return [(row["request"], row["row"], np.frombuffer(row["data"], np.float32).tolist()) for row in rows]


@pytest.mark.parametrize("mode", [None, "eager"])
def test_of_rows_that_a_map_names_and_the_tensor_has_not_nothing_is_made_up(
    insitu_records: Recording, mode: str | None
) -> None:
    model, num_steps = nn.Sequential(nn.Identity()), 300
    rules, whole = [insitu.Rule(sites="0")], [insitu.Rows("before", 0, 5, capture=True)]
    with (
        torch.inference_mode(),
        insitu.attach(model, to=insitu_records, rules=rules, max_rows=8, overhead_budget=1.0) as session,
    ):
        called: Any = model if mode is None else torch.compile(model, backend=mode, fullgraph=True)
        for step in range(num_steps):  # around the ring: wherever the next step writes lies something old
            with session.step(step, rows=whole):
                called(torch.full((5, 3), float(step)))
            if step % 50 == 49:
                session.flush()
        with session.step(900, rows=[insitu.Rows("a", 1, 4, capture=True), insitu.Rows("b", 5, 1, capture=True)]):
            called(torch.full((3, 3), 900.0))
        stats = session.stats()
    assert rows_of(insitu_records, 900) == [("a", 1, [900.0] * 3), ("a", 2, [900.0] * 3)]
    assert stats.dropped == {}
    (said,) = [row["text"] for row in insitu_records.rows("events", kind="rows_absent")]
    assert said.startswith("3 rows ")


def test_a_row_that_two_requests_name_is_told_of_both(insitu_records: Recording) -> None:
    model, rules = nn.Sequential(nn.Identity()), [insitu.Rule(sites="0")]
    shared = [insitu.Rows("a", 0, 3, capture=True), insitu.Rows("b", 1, 2, capture=True)]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules, max_rows=8) as session:
        model(torch.zeros(1, 1))
        with session.step(1, rows=shared):
            model(torch.tensor([[10.0], [11.0], [12.0]]))
    expected = [("a", 0, [10.0]), ("a", 1, [11.0]), ("a", 2, [12.0]), ("b", 1, [11.0]), ("b", 2, [12.0])]
    assert rows_of(insitu_records, 1) == expected


def test_rows_beyond_what_a_slab_holds_are_counted_with_a_row_map_and_without(insitu_records: Recording) -> None:
    model, rules = nn.Sequential(nn.Identity()), [insitu.Rule(sites="0", requests="all")]
    with (
        torch.inference_mode(),
        insitu.attach(model, to=insitu_records, rules=rules, max_rows=4, overhead_budget=1.0) as session,
    ):
        model(torch.zeros(1, 2))
        for rows in (None, [insitu.Rows("a", 0, 7)]):
            with session.step(rows=rows):
                model(torch.ones(7, 2))
        session.flush()
        stats = session.stats()
    kept = sorted((row["step_id"], row["row"]) for row in insitu_records.rows("captures"))
    assert kept == [(step, row) for step in (1, 2) for row in range(4)]
    assert (stats.produced["captures"], stats.dropped) == (14, {"captures": {"slab_full": 6}})


@pytest.mark.parametrize("mode", [None, "eager"])
def test_what_is_kept_is_what_was_returned_not_what_a_later_layer_made_of_it(
    insitu_records: Recording, mode: str | None
) -> None:
    """Memory that the model uses again, and slabs that are written again while their rows wait to be sent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Hardtanh(-0.1, 0.1, inplace=True)).eval()
    rules = [insitu.Rule(sites=name, requests="all") for name in ("0", "1")]
    xs = [torch.randn(3, 4) for _ in range(600)]
    with (
        torch.inference_mode(),
        insitu.attach(model, to=insitu_records, rules=rules, max_rows=4, overhead_budget=1.0) as session,
    ):
        called: Any = model if mode is None else torch.compile(model, backend=mode, fullgraph=True)
        for step, x in enumerate(xs):
            called(x)
            if step % 50 == 49:
                session.flush()
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    values: dict[tuple[int, str], list[list[float]]] = {}
    for row in insitu_records.rows("captures"):
        values.setdefault((row["step_id"], names[row["site"]]), []).append(np.frombuffer(row["data"], "f4").tolist())
    with torch.inference_mode():
        for step, x in list(enumerate(xs))[1:]:
            linear = model[0](x)
            assert np.allclose(values[step, "0"], linear.numpy(), 1e-5, 1e-6)
            assert np.allclose(values[step, "1"], linear.clamp(min=0).numpy(), 1e-5, 1e-6)
    assert len(values) == 2 * (len(xs) - 1)
