"""A real checkpoint on two ranks over HTTP: the record is complete, exclusive, and about the right requests."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from live_system import MODEL, Process, System, running
from transformers import AutoModelForCausalLM, AutoTokenizer

from insitu.vocabulary import IntervalClass
from insitu_collector.store import open_store

PROMPTS = [
    "Once there was a brave farmer called Ada who lived near the river.",
    "Tom",
    "One morning, Mira found a silver key near the old mill, and she took it home.",
    "What does the horse eat?",
    "In the spring, Ben walked to the harbour with a red kite under his arm. It was windy.",
    "There was once a hungry fox in the forest",
]
SERVE = ["-m", "insitu", "serve", "--stages", "2"]
TIMED = [str(Path(__file__).with_name("timed_serve.py")), "serve", "--stages", "2"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def lit(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[System, dict[str, Any], Path]:
    """A finished run of forty requests from eight clients: the system, answers by request id, the stopwatch files."""
    folder = tmp_path_factory.mktemp("lit")
    answers: dict[str, Any] = {}
    with running(folder, TIMED, {"STOPWATCH": str(folder / "watch")}) as system:

        def client(number: int) -> None:
            order = random.Random(number)
            for _ in range(5):
                prompt = order.choice(PROMPTS)
                capture = order.random() < 0.5
                tokens = order.randrange(1, 40)
                answer = system.complete(prompt, max_tokens=tokens, temperature=0, capture=capture)
                answers[answer["id"]] = {"prompt": prompt, "capture": capture, "tokens": tokens, "answer": answer}

        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 40
    return system, answers, folder / "watch"


def unbalanced(system: System) -> dict[str, tuple[int, int]]:
    """Return the (epoch, table) pairs whose rows produced are not stored + dropped, with both numbers."""
    store = open_store(system.store)
    stored: Counter[tuple[int, str]] = Counter()
    for table in store.tables():
        for epoch in store.table(table)["epoch"].to_pylist():
            stored[epoch, table] += 1
    wrong = {}
    for source in system.sources:
        for table, produced in source["produced"].items():
            kept = stored[source["epoch"], table] + sum(source["dropped"].get(table, {}).values())
            if kept != produced:
                wrong[f"{source['role']} {source['rank']} {table}"] = (produced, kept)
    return wrong


def test_produced_is_stored_plus_dropped_and_a_lost_segment_shows(lit: tuple[System, Any, Any]) -> None:
    system = lit[0]
    assert {source["role"] for source in system.sources} == {"driver", "rank", "client"}
    assert sum(sum(source["produced"].values()) for source in system.sources) > 1000
    assert unbalanced(system) == {}
    victim = next(system.store.glob("v1/sealed/intervals/*.arrow"))
    kept = victim.read_bytes()
    victim.unlink()
    try:
        assert unbalanced(system), "a deleted segment must not go unnoticed"
    finally:
        victim.write_bytes(kept)


def test_intervals_of_a_rank_never_overlap_and_cover_its_time(lit: tuple[System, Any, Any]) -> None:
    store = open_store(lit[0].store)
    intervals = store.table("intervals").sort_by("t0_ns")
    for rank in (0, 1):
        mine = intervals.filter(pc.equal(intervals["rank"], rank))
        begin, end = mine["t0_ns"].to_numpy(), mine["t1_ns"].to_numpy()
        assert (begin[1:] - end[:-1]).min() >= 0, "two intervals of one rank overlap"
        steps = _traffic_steps(store)
        first, last = steps["t0_ns"].to_numpy().min(), steps["t0_ns"].to_numpy().max()
        covered = np.clip(np.minimum(end, last) - np.maximum(begin, first), 0, None).sum()
        known = np.isin(mine["cls"].to_numpy(), [int(cls) for cls in IntervalClass])
        assert known.all()
        assert covered >= 0.95 * (last - first), f"rank {rank}: {1 - covered / (last - first):.1%} unrecorded"


def test_compute_agrees_with_a_stopwatch_around_the_same_calls(lit: tuple[System, Any, Path]) -> None:
    system, _, watch = lit
    intervals = open_store(system.store).table("intervals")
    for rank, file in enumerate(sorted(watch.parent.glob(f"{watch.name}.*"))):
        mine = intervals.filter(
            pc.and_(pc.equal(intervals["rank"], rank), pc.equal(intervals["cls"], int(IntervalClass.COMPUTE)))
        )
        begin, end = mine["t0_ns"].to_numpy(), mine["t1_ns"].to_numpy()
        calls = np.frombuffer(file.read_bytes(), np.int64).reshape(-1, 2)
        calls = calls[calls[:, 0] >= begin.min()]  # before it attached, the engine heated its kernels
        recorded, timed = (end - begin).sum(), (calls[:, 1] - calls[:, 0]).sum()
        assert recorded == pytest.approx(timed, rel=0.05), f"rank {rank}"


def test_every_captured_row_is_the_hidden_state_of_that_request_run_alone(lit: tuple[System, Any, Any]) -> None:
    system, answers, _ = lit
    store = open_store(system.store)
    captures = store.table("captures").to_pylist()
    sites = {(row["rank"], row["site"]): row for row in store.table("sites").to_pylist()}
    oracle = _Oracle()
    seen: Counter[str] = Counter()
    for row in captures:
        site = sites[row["rank"], row["site"]]
        request = answers.get(row["request"])
        if request is None or site["layer"] is None:
            continue
        expected = oracle.after_layer(request["prompt"], request["tokens"], site["layer"])[row["position"]]
        got = np.frombuffer(row["data"], np.float32)
        assert np.allclose(got, expected, rtol=1e-3, atol=2e-4), (row["request"], site["name"], row["position"])
        seen[row["request"]] += 1
    wanted = {name: answer for name, answer in answers.items() if answer["capture"]}
    assert set(seen) == set(wanted), "exactly the requests that opted in"
    for name, answer in wanted.items():
        positions = oracle.num_prompt(answer["prompt"]) + answer["tokens"] - 1
        assert seen[name] == positions * oracle.num_layers, "every position at every layer, once"


def test_the_driver_tells_each_requests_life(lit: tuple[System, Any, Any]) -> None:
    system, answers, _ = lit
    rows = open_store(system.store).table("requests").to_pylist()
    lives: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: row["t_ns"]):
        lives.setdefault(row["request"], []).append(row["event"])
    for name in answers:
        assert lives[name][0] == 0, "arrived first"
        assert lives[name][-1] == 7, "finished last"
        assert 3 in lives[name] or answers[name]["tokens"] == 0


def test_output_is_the_same_with_and_without_a_probe(tmp_path: Path, model: Path) -> None:
    def answers(system: System) -> list[str]:
        return [system.complete(prompt, max_tokens=24, temperature=0)["choices"][0]["text"] for prompt in PROMPTS]

    with running(tmp_path, SERVE) as system:
        observed = answers(system)
    bare = Process([*SERVE, "--model", str(MODEL), "--port", "0"])
    url = bare.wait_for(r"ready on (http://[\w.:]+)")[1]
    alone = answers(System(tmp_path, url, []))
    bare.stop()
    assert observed == alone
    assert observed == [_Oracle().text(prompt, 24) for prompt in PROMPTS]


def test_stalls_reads_the_store_as_one_document(lit: tuple[System, Any, Any]) -> None:
    command = [sys.executable, "-m", "insitu", "stalls", str(lit[0].store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "insitu.stalls/1"
    window_s = (document["ledger_window_unix_ns"][1] - document["ledger_window_unix_ns"][0]) / 1e9
    for rank in (0, 1):
        mine = [row for row in document["ledger"] if row["rank"] == rank]
        assert sum(row["seconds"] for row in mine) == pytest.approx(window_s, rel=1e-6)
        vague = sum(row["seconds"] for row in mine if row["class"] in ("unrecorded", "other"))
        assert vague <= 0.05 * window_s


def _traffic_steps(store: Any) -> pa.Table:
    """Return the steps of stage 0 that carried a request of a client."""
    steps = store.table("steps")
    mine = [
        bool(row["rows"]) and not all(entry["request"].startswith("warmup-") for entry in row["rows"])
        for row in steps.to_pylist()
    ]
    return steps.filter(pa.array(mine))


class _Oracle:
    """`transformers` on the same checkpoint, one request at a time."""

    def __init__(self) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self._model.eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
        self._states: dict[tuple[str, int], list[Any]] = {}
        self.num_layers = int(self._model.config.num_hidden_layers)

    def _ids(self, prompt: str, num_tokens: int) -> torch.Tensor:
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        self._model.generation_config.eos_token_id = None
        with torch.inference_mode():
            found: torch.Tensor = self._model.generate(
                ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        return found

    def num_prompt(self, prompt: str) -> int:
        return len(self._tokenizer(prompt)["input_ids"])

    def text(self, prompt: str, num_tokens: int) -> str:
        found = self._ids(prompt, num_tokens)[0, self.num_prompt(prompt) :]
        return str(self._tokenizer.decode(found, skip_special_tokens=True))

    def after_layer(self, prompt: str, num_tokens: int, layer: int) -> Any:
        """Return what layer `layer` hands on, float32 [num positions, hidden]: a hook, since the last is normed."""
        key = prompt, num_tokens
        if key not in self._states:
            states: list[Any] = [None] * self.num_layers
            handles = [
                block.register_forward_hook(
                    lambda module, args, output, at=at: states.__setitem__(
                        at, (output if isinstance(output, torch.Tensor) else output[0])[0].numpy()
                    )
                )
                for at, block in enumerate(self._model.model.layers)
            ]
            ids = self._ids(prompt, num_tokens)
            with torch.inference_mode():
                self._model(ids)
            for handle in handles:
                handle.remove()
            self._states[key] = states
        return self._states[key][layer]
