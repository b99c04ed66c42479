"""What tests of the plug-in for vLLM have in common: runs of it, their stores, and what transformers computes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from random_checkpoints import make

from insitu.vocabulary import IntervalClass
from insitu_collector.store import Store, open_store

ROOT: Final = Path(__file__).resolve().parents[2]
MODEL: Final = ROOT / "examples" / "models" / "tiny-llama"
NUM_LAYERS: Final = 8
VOCABULARY: Final = 2048
DEADLINE_S: Final = 280
TOLERANCE: Final = 1e-4
"""Largest difference of a value, as a share of the largest magnitude in its row, between two implementations."""


CACHED: Final = 128
"""A block of vLLM's cache on a host."""
STAGGERED: Final = (3, 5, 8, 13, 21, 34, 70, 90)
"""Lengths of prompts. The last two are longer than a step may be: they come in chunks."""
SHORT: Final = 6
"""Tokens that are asked for where it is not about them."""


def environment(to: str, **further: str) -> dict[str, str]:
    """Return the environment of a vLLM on this host. Errors of the plug-in are contained in it, as with a user."""
    cores = sorted(os.sched_getaffinity(0))
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "INSITU", "VLLM"))}
    return {
        **mine,
        "INSITU_ENABLED": "1",
        "INSITU_TO": to,
        "VLLM_PLUGINS": "insitu",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores[:2])),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **further,
    }


@dataclass(frozen=True)
class Engine:
    """One engine to run."""

    name: str
    batches: Sequence[Sequence[dict[str, Any]]]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `vllm.LLM`, beside what all have."""
    variables: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    """What is done to vLLM before it is made: a name of `vllm_runs.BEFORE`."""
    keys: bool = False
    """Whether to ask its workers for the keys of their compile cache."""


@dataclass(frozen=True)
class Run:
    """What one engine was asked and answered, and what insitu stored of it."""

    folder: Path
    """Its store."""
    answered: dict[str, Any]
    log: str

    @cached_property
    def store(self) -> Store:
        return open_store(str(self.folder))

    def rows(self, table: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.store.table(table).to_pylist()
        return found

    @cached_property
    def names(self) -> dict[str, dict[str, Any]]:
        """vLLM's own name of a request -> it. vLLM adds something random to the name that it answers with."""
        by_answer = {request["name"]: request for request in self.answered["requests"]}
        stored = {row["request"] for row in self.rows("requests")}
        return {name: by_answer[name.rpartition("-")[0]] for name in stored}

    def time_of(self, rank: int) -> list[dict[str, Any]]:
        """Return a rank's intervals by time, from where it begins to say where its time goes."""
        rows = sorted((row for row in self.rows("intervals") if row["rank"] == rank), key=lambda row: row["t0_ns"])
        begun = next(at for at, row in enumerate(rows) if row["cls"] != IntervalClass.GC)
        return rows[begun:]

    def said(self) -> list[str]:
        """Return the lines that insitu wrote for people."""
        return [line.removeprefix("insitu: ") for line in self.log.splitlines() if line.startswith("insitu: ")]


def ask(prompt: Sequence[int], max_tokens: int = 12, *, capture: bool = False) -> dict[str, Any]:
    extra = {"insitu": "capture=rows"} if capture else None
    return {"prompt": list(prompt), "max_tokens": max_tokens, "extra": extra}


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(5, VOCABULARY, length).tolist() for length in lengths]


def run_vllm(python: str, folder: Path, *engines: Engine) -> list[Run]:
    """Run engines one after the other in a process of its own, each with a store of its own, and wait for its end."""
    base = {"model": str(MODEL), "dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 64}
    base |= {"max_num_seqs": 8}
    plans = [
        {
            "name": each.name,
            "engine": {**base, **each.options},
            "batches": each.batches,
            "environment": {"INSITU_TO": f"file://{folder / each.name}", **each.variables},
            "before": each.before,
            "keys": each.keys,
        }
        for each in engines
    ]
    (folder / "plan.json").write_text(json.dumps(plans))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("vllm_runs.py")), "plan.json", "out.json"],
            env=environment("file://nowhere"),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    code = end(process, DEADLINE_S)
    text = (folder / "log").read_text()
    assert code == 0, text[-4000:]
    answered = json.loads((folder / "out.json").read_text())
    logs = text.split("=== ")[1:]
    return [Run(folder / e.name, found, log) for e, found, log in zip(engines, answered, logs, strict=True)]


REPEATING: Final = [prompt * 2 for prompt in prompts([9, 14])]
"""Each says everything twice, so that speculation by what was said before has something to go by."""


def end(process: subprocess.Popen[bytes], within_s: float = 30.0) -> int:
    """Wait for a process that leads a session; kill all that is left of it. Return its exit code."""
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


class Reference:
    """A plain transformers model run over the tokens of a request."""

    def __init__(self, folder: Path = MODEL) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def continued(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Return what the model says next, the likeliest token each time."""
        with torch.inference_mode():
            found = self._model.generate(
                torch.tensor([list(prompt)]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
            )
        tokens: list[int] = found[0, len(prompt) :].tolist()
        return tokens

    def of(self, tokens: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Return the residual stream after each layer, and the logits, of every position."""
        found: dict[str, NDArray[np.float32]] = {}
        last: list[Any] = []
        hook = self._model.model.layers[-1].register_forward_hook(lambda *call: last.append(call[2]))
        try:
            with torch.inference_mode():
                output = self._model(torch.tensor([list(tokens)]), output_hidden_states=True)
        finally:
            hook.remove()
        for layer, state in enumerate(output.hidden_states[1:-1]):
            found[f"L{layer}.resid_post"] = state[0].numpy()
        after = last[0][0] if isinstance(last[0], tuple) else last[0]  # the last of those is normed
        found[f"L{len(output.hidden_states) - 2}.resid_post"] = after.reshape(-1, after.shape[-1]).numpy()
        found["logits"] = output.logits[0].numpy()
        return found


@dataclass(frozen=True)
class Compared:
    num_rows: int
    difference: float


def compare(run: Run, reference: Reference, sites: Sequence[str]) -> Compared:
    """Hold the captured rows of every request that asked for them against transformers; each position once."""
    num_rows, most = 0, 0.0
    captures = run.store.captures(columns=["request", "site", "position", "shape", "data"]).to_pylist()
    by_place: dict[tuple[str, str], dict[int, NDArray[np.float32]]] = {}
    for row in captures:
        place = by_place.setdefault((row["request"], row["site"]), {})
        assert row["position"] not in place, f"{row['request']} has position {row['position']} of {row['site']} twice"
        place[row["position"]] = np.frombuffer(row["data"], np.float32)
    asked = {name: request for name, request in run.names.items() if request["extra"]}
    assert {name for name, _ in by_place} == set(asked), "rows of other requests than asked for them"
    for name, request in asked.items():
        tokens = [*request["prompt"], *request["output"]][:-1]
        expected = reference.of(tokens)
        for site in sites:
            found = by_place[name, site]
            if site != "logits":
                assert sorted(found) == list(range(len(tokens))), f"{name} misses positions of {site}"
            for position, values in found.items():
                wanted = expected[site][position]
                most = max(most, float(np.abs(values - wanted).max() / np.abs(wanted).max()))
            num_rows += len(found)
    return Compared(num_rows, most)


@dataclass(frozen=True)
class Shared:
    """A run of two ranks that share each layer, and the same model in transformers."""

    run: Run
    reference: Reference


def run_eager(python: str, folder: Path) -> Run:
    """One rank: staggered lengths, and a long prompt that is asked twice."""
    staggered = [ask(prompt, 6 + at % 9, capture=at % 8 != 3) for at, prompt in enumerate(prompts(STAGGERED * 5))]
    long = ask(prompts([200], seed=1)[0], 4)
    return run_vllm(python, folder, Engine("eager", [staggered, [long], [long]], {"enforce_eager": True}))[0]


def run_compiled(python: str, folder: Path) -> Run:
    """Two stages in graphs, rows of any layer on request."""
    batch = [ask(prompt, 6 + at % 9, capture=at % 4 != 1) for at, prompt in enumerate(prompts(STAGGERED * 2))]
    rows = {"INSITU_VLLM_ROWS": "L*.resid_post,logits"}
    return run_vllm(python, folder, Engine("compiled", [batch], {"pipeline_parallel_size": 2}, rows, keys=True))[0]


def run_shared(architecture: str, python: str, folder: Path) -> Shared:
    """Two ranks of one stage."""
    model = make(architecture, folder / "model")
    batch = [ask(prompt, 5, capture=at % 2 == 0) for at, prompt in enumerate(prompts((3, 8, 21, 70, 90)))]
    options = {"model": str(model), "tensor_parallel_size": 2, "enforce_eager": True, "skip_tokenizer_init": True}
    return Shared(run_vllm(python, folder, Engine("eager", [batch], options))[0], Reference(model))


def run_refused(python: str, folder: Path) -> Mapping[str, Run]:
    """What is not known, or cannot be told; and a graph without rows."""
    batch, eager = [[ask(prompt, SHORT, capture=True) for prompt in REPEATING]], {"enforce_eager": True}
    guess = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    unknown = {"model": str(make("OPT", folder / "opt")), "skip_tokenizer_init": True}
    engines = (
        Engine("speculative", batch, {**eager, "speculative_config": guess}),
        Engine("unknown-model", batch, {**eager, **unknown}),
        Engine("no-such-site", batch, eager, {"INSITU_VLLM_ROWS": "L*.resid_pots"}),
        Engine("graph", batch),
        Engine("other-plugin", batch, eager, {}, "other_plugin"),
        Engine("broken", batch, eager, {}, "broken_row_maps"),
        Engine("unknown-version", batch, eager, {}, "other_version"),
    )
    return {engine.name: run for engine, run in zip(engines, run_vllm(python, folder, *engines), strict=True)}


def run_cached(python: str, folder: Path) -> Mapping[str, Run]:
    """One rank whose graph vLLM saves: made, loaded by the next process, and asked for with rows of other layers."""
    batch = [[ask(prompt, SHORT, capture=True) for prompt in prompts((5, 34, 90))]]
    cache = str(folder / "cache")
    engines = [
        Engine(name, batch, {}, {"INSITU_VLLM_ROWS": rows, "VLLM_CACHE_ROOT": cache}, "in_pieces", keys=True)
        for name, rows in (
            ("made", "L[1-4].resid_post"),
            ("loaded", "L[1-4].resid_post"),
            ("other", "L[2-5].resid_post"),
        )
    ]
    return {engine.name: run for engine, run in zip(engines, run_vllm(python, folder, *engines), strict=True)}


def refused_runner(python: str) -> str:
    """Return what is said of a runner of the second generation. It wants an accelerator: its class is all there is."""
    look = (
        "from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Runner\n"
        "from insitu.vllm.versions import refused_runner\n"
        "print(refused_runner(Runner.__new__(Runner)))"
    )
    told = subprocess.run([python, "-c", look], env=environment("file://nowhere"), capture_output=True, text=True)
    return told.stdout.splitlines()[-1]
