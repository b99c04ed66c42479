"""`insitu serve` as processes over HTTP: greedy output, errors, stopping, a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from live_system import Process
from package_kit import install
from wait_kit import until

from insitu.plugins.discovery import EXPORTERS

SERVE = ["-m", "insitu", "serve", "--port", "0"]
pytestmark = pytest.mark.timeout(240)


class Server:
    """A running `insitu serve`, spoken to by token ids."""

    def __init__(self, folder: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.process = Process([*SERVE, "--model", str(folder), *options], environment)
        self.model = folder.name
        self.url = self.process.wait_for(r"ready on (http://[\w.:]+)")[1]
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def post(self, prompt: Any = (5, 6, 7), headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}
        return self.http.post("/v1/completions", json=body, headers=headers)

    def ids(self, prompt: list[int], num_tokens: int) -> list[int]:
        answer = self.post(prompt, max_tokens=num_tokens, return_token_ids=True)
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    @property
    def pid(self) -> int:
        return self.process.process.pid

    def ranks(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.pid).children()
        return found

    def stop(self) -> str:
        self.http.close()
        return self.process.stop()


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path], commit_seed: int) -> Path:
    return make_checkpoint("llama", commit_seed)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """Two stages, used by every test that does not stop it."""
    running = Server(folder, "--stages", "2", "--max-queue", "40", "--max-len", "200")
    yield running
    children = running.ranks()
    stdout = running.stop()
    assert running.process.process.returncode == 0, running.process.lines
    assert json.loads(stdout)["schema"] == "insitu.serve/1"
    assert len(json.loads(stdout)["sources"]) == 3
    assert not any(child.is_running() for child in children)


@pytest.fixture(scope="module")
def deep(folder: Path) -> Iterator[Server]:
    """Two stages with more micro-batches in flight than stages, few places each."""
    running = Server(folder, "--stages", "2", "--in-flight", "5", "--max-batch", "2", "--max-queue", "40")
    yield running
    running.stop()
    assert running.process.process.returncode == 0, running.process.lines


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Server]:
    """One stage with two places, every step at least 15 ms, so that it is easily full."""
    environment = {"INSITU_ENGINE_FAULTS": '["slow-stage=0:15@0"]'}
    limits = ("--max-batch", "2", "--token-budget", "16", "--max-queue", "12")
    running = Server(folder, "--stages", "1", *limits, environment=environment)
    yield running
    running.stop()
    assert running.process.process.returncode == 0, running.process.lines


@pytest.mark.parametrize("which", ["small", "server", pytest.param("deep", marks=pytest.mark.matrix)])
def test_greedy_output_over_http_is_that_of_transformers(
    which: str, folder: Path, request: pytest.FixtureRequest, expected: Any, draw_prompts: Any, commit_seed: int
) -> None:
    asked = draw_prompts(commit_seed + 1, 20, 300)
    one: Server = request.getfixturevalue(which)
    with ThreadPoolExecutor(12) as clients:
        # Twelve at a time, each client going on as soon as it has its answer: arrivals are staggered by nature.
        found = list(clients.map(lambda pair: one.ids(*pair), asked))
    assert found == expected(folder, asked), f"seed {commit_seed}"


def test_the_stream_says_the_same(server: Server) -> None:
    whole = server.ids([9, 8, 7], 12)
    body = {"model": server.model, "prompt": [9, 8, 7], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert [token for event in events for choice in event["choices"] for token in choice["token_ids"]] == whole
    assert [c["finish_reason"] for event in events for c in event["choices"]][-1] == "length"
    assert events[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_a_seed_repeats_a_draw_whatever_runs_beside_it(server: Server) -> None:
    def draw(seed: int) -> list[int]:
        answer = server.post([4, 4], max_tokens=15, temperature=1.5, top_k=50, seed=seed, return_token_ids=True)
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    with ThreadPoolExecutor(6) as clients:
        drawn = list(clients.map(draw, [1, 2, 1, 3, 1, 2]))
    assert drawn[0] == drawn[2] == drawn[4]
    assert drawn[1] == drawn[5]
    assert drawn[0] != drawn[1] != drawn[3]


def test_a_connection_stays_open_for_longer_than_clients_keep_one(server: Server) -> None:
    with closing(HTTPConnection(server.url.removeprefix("http://"))) as connection:
        connection.request("GET", "/health/live")
        assert connection.getresponse().read()
        connection.sock.settimeout(6.5)  # httpx forgets one that was idle for 5 s
        with pytest.raises(TimeoutError):
            connection.sock.recv(1)


def test_end_of_text_ends_the_output_unless_told_otherwise(
    make_checkpoint: Callable[..., Path], server: Server, folder: Path
) -> None:
    ids = server.ids([9, 8, 7], 12)
    assert len(ids) == 12
    answer = server.post([9, 8, 7], max_tokens=12, ignore_eos=False, return_token_ids=True)
    choice = answer.json()["choices"][0]
    expected_ids = ids[: ids.index(2) + 1] if 2 in ids else ids
    assert choice["token_ids"] == expected_ids
    assert choice["finish_reason"] == ("stop" if 2 in ids else "length")


def test_models_and_health(server: Server) -> None:
    models = server.http.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [server.model]
    assert server.http.get(f"/v1/models/{server.model}").json()["id"] == server.model
    for path in ("/health/live", "/health/ready", "/health"):
        assert server.http.get(path).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"prompt": [1] * 200}, 400, "prompt"),
        ({"prompt": [1] * 100, "max_tokens": 101}, 400, "max_tokens"),
        ({"prompt": [300]}, 400, "prompt"),
        ({"prompt": "words"}, 400, "prompt"),
        ({"model": "another"}, 404, "model"),
    ],
)
def test_bad_requests_get_an_openai_shaped_error(
    server: Server, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = server.post(**fields)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_a_header_that_asks_for_what_there_is_not_costs_no_request_and_is_said_once(small: Server) -> None:
    for word in ("row", "row", "all"):
        assert small.post(max_tokens=1, headers={"insitu": f"capture={word}"}).status_code == 200
    said = [line for line in small.process.lines if "header insitu" in line]
    assert said == [
        "insitu serve: the header insitu: capture=row is not known; it may be capture=rows; "
        "rows of such requests are not taken"
    ]


def test_what_is_no_request_gets_one_too(server: Server) -> None:
    for answer, status in (
        (server.http.post("/v1/completions", content=b"{half"), 400),
        (server.http.post("/v1/completions", content=b'{"prompt": "' + b"a" * 3_000_000 + b'"}'), 413),
        (server.post(prompt=[]), 400),
        (server.http.get("/v1/completions"), 405),
        (server.http.get("/v1/nothing"), 404),
        (server.http.get("/v1/models/another"), 404),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_a_full_queue_answers_429_with_retry_after(small: Server) -> None:
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda _: small.post(max_tokens=30), range(20)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 20 - 2 - 12 - 4, "two run, twelve wait, a few may have ended meanwhile"
    assert all(answer.status_code in (200, 429) for answer in answers)
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


def test_a_client_that_leaves_frees_its_place(small: Server) -> None:
    body = {"model": small.model, "prompt": [1], "max_tokens": 240, "ignore_eos": True, "return_token_ids": True}
    with small.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{small.url}/v1/completions", json=body, timeout=0.2)
    began = time.monotonic()
    assert len(small.ids([1], 2)) == 2
    assert time.monotonic() - began < 240 * 0.015, "both places were taken for longer than that"


def test_sigterm_lets_requests_finish_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """On the way: NaN ends its own request with an error, and the rank lives on."""
    log = tmp_path / "faults.jsonl"
    environment = {"INSITU_ENGINE_FAULTS": '["nan=3:4"]', "INSITU_ENGINE_FAULT_LOG": str(log)}
    one = Server(folder, "--stages", "2", environment=environment)
    children = one.ranks()
    assert len(children) == 2
    broken = one.post(max_tokens=30)
    assert broken.status_code == 500
    assert broken.json()["error"]["code"] == "not_finite"
    done = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["kind"], line["layer"], line["rank"]) for line in done} == {("nan", 3, 1)}
    started = threading.Event()

    def read() -> list[str]:
        body = {"model": one.model, "prompt": [1], "max_tokens": 200, "ignore_eos": True, "stream": True}
        body["return_token_ids"] = True
        with httpx.stream("POST", f"{one.url}/v1/completions", json=body, timeout=60) as answer:
            lines = []
            for line in answer.iter_lines():
                lines.append(line)
                started.set()
            return [line for line in lines if line]

    with ThreadPoolExecutor(1) as clients:
        reading = clients.submit(read)
        assert started.wait(30)
        os.kill(one.pid, signal.SIGTERM)
        lines = reading.result(timeout=30)
    stdout = one.stop()
    assert lines[-1] == "data: [DONE]"
    assert "length" in lines[-2]
    assert len(lines) == 202
    assert one.process.process.returncode == 0, one.process.lines
    assert len(stdout.splitlines()) == 1
    assert not any(child.is_running() for child in children)


def test_what_does_not_finish_within_the_grace_is_told_why(folder: Path) -> None:
    environment = {"INSITU_ENGINE_FAULTS": '["slow-stage=0:100@0"]'}
    one = Server(folder, "--stages", "1", "--grace", "0.2", environment=environment)
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(one.post, max_tokens=200)
        until_busy(one)
        os.kill(one.pid, signal.SIGINT)
        answer = waiting.result(timeout=30)
    assert answer.status_code == 503
    assert "stopping" in answer.json()["error"]["message"]
    one.stop()
    assert one.process.process.returncode == 0, one.process.lines


def until_busy(server: Server) -> None:
    """Return once a rank has begun to work on a request: its CPU time moves."""
    rank = server.ranks()[0]
    before = rank.cpu_times().user
    until(lambda: rank.cpu_times().user > before, "work of rank 0")


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_rank_that_is_killed_is_named_to_client_and_operator(folder: Path, victim: int) -> None:
    environment = {"INSITU_ENGINE_FAULTS": '["slow-stage=1:50@0"]'}
    one = Server(folder, "--stages", "2", environment=environment)
    children = sorted(one.ranks(), key=lambda child: child.pid)
    with ThreadPoolExecutor(3) as clients:
        waiting = [clients.submit(one.post, max_tokens=150) for _ in range(3)]
        until_busy(one)
        children[victim].kill()
        answers = [answer.result(timeout=30) for answer in waiting]
    for answer in answers:
        assert answer.status_code == 503
        assert f"rank {victim} (stage {victim}) was killed by SIGKILL" in answer.json()["error"]["message"]
    one.process.wait_for(rf"^insitu serve: rank {victim} \(stage {victim}\) was killed by SIGKILL$")
    one.process.process.wait(30)
    stdout = one.stop()
    assert one.process.process.returncode == 1
    account = json.loads(stdout)
    assert account["schema"] == "insitu.serve/1"
    assert 1 <= len(account["sources"]) <= 2, "the driver's, and that of the rank that is left"
    assert not any("Traceback" in line for line in one.process.lines)
    assert not any(child.is_running() for child in children)


def test_ranks_die_with_a_driver_that_is_killed(folder: Path) -> None:
    starting = Process([*SERVE, "--model", str(folder), "--stages", "2"])
    driver = psutil.Process(starting.process.pid)
    until(lambda: len(driver.children()) == 2, "two ranks", 60.0)
    children = driver.children()
    driver.kill()
    starting.stop()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def refusal(*options: str) -> str:
    """Return the one line that a start which cannot work prints."""
    done = subprocess.run(
        [sys.executable, *SERVE, *options],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if "nothing is observed" not in line]
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert len(said) == 1, said
    assert said[0].startswith("insitu serve: ")
    return said[0]


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    assert "nowhere" in refusal("--model", str(tmp_path / "nowhere"))
    assert "--to" in refusal("--model", str(folder), "--to", "carrier-pigeon://x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = refusal("--model", str(folder), "--port", str(port))
        assert str(port) in text and "--port" in text
    assert "4 layers" in refusal("--model", str(folder), "--stages", "5")
    (tmp_path / "a-file").touch()
    assert "a-file" in refusal("--model", str(folder), "--to", f"file://{tmp_path}/a-file/store")
    assert refusal("--model", str(folder), "--to", "grpc://h:0").startswith(
        "insitu serve: --to grpc://h:0 cannot be used: destination grpc://h:0: there is no such port; write one"
    )


def test_a_destination_of_another_package_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "acme_ships", {EXPORTERS: {"carrier-pigeon": "acme_ships:Pigeon"}})
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'acme_ships'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert "nowhere" in refusal("--model", str(tmp_path / "nowhere"), "--to", "carrier-pigeon://x")


def test_a_destination_from_the_environment_is_used_and_what_it_keeps_is_said(folder: Path, tmp_path: Path) -> None:
    server = Server(folder, environment={"INSITU_TO": f"file://{tmp_path}/store", "INSITU_KEEP_BYTES": "500MiB"})
    assert server.post(max_tokens=2).status_code == 200
    account = json.loads(server.stop().splitlines()[-1])
    for source in account["sources"]:
        assert source["durable"] == {table: rows for table, rows in source["produced"].items() if rows}
    assert len(list((tmp_path / "store/v1/sealed/sources").iterdir())) == 2, "driver and rank, each its own shard"
    assert f"file://{tmp_path}/store keeps 500 MiB or 24 h, oldest first" in "\n".join(server.process.lines)


def test_a_setting_nobody_knows_is_one_line_and_a_usage_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "insitu.toml").write_text("too = 1")
    command = [sys.executable, *SERVE, "--model", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: insitu.toml: no setting 'too'; the settings are to, disabled")
