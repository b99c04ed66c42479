"""`vllm serve`: of two stages, with a collector and a judge beside it; of engines side by side; what is asked of it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from live_system import collecting, free_port
from random_checkpoints import make
from vllm_cases import DEADLINE_S, MODEL, ROOT, end, environment, prompts

from insitu_collector.store import Store, open_store

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
HEALTHY_S = 15.0
SLOW_MS = 120
OF_ALL = (
    *("--served-model-name", "tiny", "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256"),
    *("--max-num-batched-tokens", "64", "--max-num-seqs", "8", "--no-enable-prefix-caching"),
)
TWO_STAGES = ("--model", str(MODEL), "--pipeline-parallel-size", "2", "--worker-cls", "slow_worker.SlowWorker")
TWO_ENGINES = ("--data-parallel-size", "2")
OF_TINY = ("--skip-tokenizer-init", "--enforce-eager")


@dataclass
class Served:
    """What a server answered, and what is in the store."""

    store: Store
    asked: dict[str, Any]
    """The answer to the request that had headers."""
    plain: dict[str, Any]
    opted: dict[str, Any]
    """The answer to the one that asked with `vllm_xargs`."""
    failed: list[str]
    """Of the traffic."""
    verdict: Any = None
    last: dict[str, Any] = field(default_factory=dict)
    """The answer to the request after which the server was told to end, at once."""


def complete(url: str, prompt: list[int], max_tokens: int = 16, headers: Any = None, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=120)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@dataclass
class Traffic:
    """Clients that ask one after the other until told to stop."""

    url: str
    failed: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def _ask(self, number: int) -> None:
        drawn = prompts([8 + 5 * number] * 4, seed=number)
        turn = 0
        while not self._over.is_set():
            turn += 1
            try:
                complete(self.url, [number + 5, turn % 2000 + 5, *drawn[turn % 4]])
            except httpx.HTTPError as error:
                self.failed.append(repr(error))

    @contextmanager
    def running(self, num_clients: int) -> Iterator[None]:
        clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)]
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._over.set()
            for client in clients:
                client.join()


def until(true: Callable[[], Any], within_s: float, every_s: float = 0.5) -> Any:
    """Return what a condition gives once it is true."""
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(every_s)
    return found


@contextmanager
def serving(python: str, folder: Path, to: str, *options: str, **variables: str) -> Iterator[str]:
    """Yield the URL of a vLLM server once it is healthy; it is told to end as soon as the block is left."""
    url = f"http://127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            # what `vllm serve` runs; the word itself asks for a package named vllm, which the host build is not
            [
                *(python, "-m", "vllm.entrypoints.openai.api_server", *OF_ALL, *options),
                *("--port", url.rpartition(":")[2]),
            ],
            env=environment(to, VLLM_ENABLE_V1_MULTIPROCESSING="1", **variables),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
    try:
        until(lambda: _is_healthy(server, url), DEADLINE_S - 60)
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        end(server)


def _is_healthy(server: subprocess.Popen[bytes], url: str) -> bool:
    assert server.poll() is None, "vllm serve has ended"
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def run_served(vllm_python: str, folder: Path) -> Served:
    """Serve requests with and without headers, then traffic, in the middle of which the last stage becomes slow."""
    store, marker, port = folder / "store", folder / "slow", free_port()
    with (
        collecting(store, port, "--judge"),
        serving(
            vllm_python,
            folder,
            f"grpc://127.0.0.1:{port}",
            *TWO_STAGES,
            *("--otlp-traces-endpoint", f"http://127.0.0.1:{port}"),
            INSITU_VLLM_ROWS="L*.resid_post",
            SLOW_WHILE=str(marker),
            SLOW_MS=str(SLOW_MS),
            OTEL_EXPORTER_OTLP_TRACES_INSECURE="true",
            PYTHONPATH=f"{os.environ.get('PYTHONPATH', '')}:{ROOT / 'tests' / 'vllm'}",
        ) as url,
    ):
        found = _use(url, store, marker)
        found.last = complete(url, prompts([20], seed=10)[0], headers={"insitu": "capture=rows"})
    found.store = open_store(str(store))
    return found


def _use(url: str, store: Path, marker: Path) -> Served:
    prompt = prompts([20], seed=9)[0]
    headers = {"insitu": "capture=rows", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    asked = complete(url, prompt, headers=headers)
    opted = complete(url, prompt, vllm_xargs={"insitu": "capture=rows"})
    plain = complete(url, prompt)
    traffic = Traffic(url)
    with traffic.running(6):
        threading.Event().wait(HEALTHY_S)  # what is healthy here has to be seen first
        marker.touch()
        verdict = until(lambda: _slow_stage(store), 120)
        marker.unlink()
    return Served(open_store(str(store)), asked, plain, opted, traffic.failed, verdict)


@dataclass
class Engines:
    """Engines side by side behind one server, and what each answered."""

    store: Store
    answered: dict[int, list[dict[str, Any]]]
    """By the engine that was asked, as vLLM counts them."""


def run_data_parallel(vllm_python: str, folder: Path) -> Engines:
    """Two engines of a dense model; the first is asked three times, the other twice, each for its rows."""
    store, model = folder / "store", make("Qwen3", folder / "model")
    with serving(vllm_python, folder, f"file://{store}", *OF_TINY, "--model", str(model), *TWO_ENGINES) as url:
        answered = {
            engine: [
                complete(url, prompt, headers={"insitu": "capture=rows", "X-data-parallel-rank": str(engine)})
                for prompt in prompts(lengths, seed=engine)
            ]
            for engine, lengths in ((0, [5, 20, 90]), (1, [8, 34]))
        }
    return Engines(open_store(str(store)), answered)


def run_experts_of_engines(vllm_python: str, folder: Path) -> Store:
    """Two engines that share experts are started and ended: more of them vLLM does not do on a host."""
    store, model = folder / "store", make("Qwen2Moe", folder / "model")
    options = ("--model", str(model), *TWO_ENGINES, "--enable-expert-parallel")
    with serving(vllm_python, folder, f"file://{store}", *OF_TINY, *options):
        pass
    return open_store(str(store))


def _slow_stage(store: Path) -> Any:
    verdicts = open_store(str(store)).verdicts()
    return next((verdict for verdict in verdicts if verdict.kind == "stage_limits"), None)
