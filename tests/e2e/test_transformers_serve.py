"""`insitu run -- transformers serve`: a server that knows nothing of insitu says whose rows it computes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from insitu_collector.store import open_store

pytest.importorskip("accelerate", reason="transformers serve needs it to load a model")
pytestmark = [pytest.mark.timeout(120), pytest.mark.e2e]
SERVE = "from transformers.cli.transformers import main; main()"


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _ask(url: str, body: dict[str, Any], server: subprocess.Popen[str], within_s: float = 60.0) -> dict[str, Any]:
    """Ask a server that may not listen yet."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    until = time.monotonic() + within_s
    while True:
        assert server.poll() is None, server.communicate()[1]
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except urllib.error.URLError:
            assert time.monotonic() < until, "the server never listened"
            time.sleep(0.1)


@pytest.mark.parametrize("options", [(), ("--continuous-batching",)], ids=["generate", "continuous batching"])
def test_a_server_is_observed_without_code(tmp_path: Path, model: Path, options: tuple[str, ...]) -> None:
    port, store = _free_port(), tmp_path / "store"
    serve = [sys.executable, "-c", SERVE, "serve", str(model), "--port", str(port), "--device", "cpu", *options]
    server = subprocess.Popen(
        [sys.executable, "-m", "insitu", "run", "--to", f"file://{store}", "--", *serve],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        body = {"model": str(model), "prompt": "Once there was", "max_tokens": 4, "temperature": 0}
        answer = _ask(f"http://127.0.0.1:{port}/v1/completions", body, server)
        assert answer["choices"][0]["text"]
    finally:
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=30)
    assert "insitu: attached to LlamaForCausalLM" in said
    steps = open_store(store).table("steps").to_pylist()
    assert steps[0]["rows"], f"its first call is its first step, and somebody's: {said}"
    names = {entry["request"] for step in steps for entry in step["rows"] or ()}
    assert len(names) == 1
    assert (names == {"generate-0/0"}) == (not options)
    positions = [entry["position"] for step in steps for entry in step["rows"]]
    first = steps[0]["rows"][0]["count"]
    assert positions == [0, *range(first, first + len(steps) - 1)]
