"""`insitu load`: prompts of mixed lengths at random times, as independent users would send them.

Open loop: when a request is sent never depends on when another was answered, so a slow server gets no mercy and
its queue shows in the figures. What is sent, and when, follows from the seed alone. With `--concurrency N` it is a
closed loop instead: N users, each sending its next request as soon as the last was answered, so that the server always
has the same to do and the figures say what it can do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from insitu_engine.load_plan import Planned, endless, plan

SCHEMA: Final = "insitu.load/1"
DEFAULT_RATE: Final = 4.0
GRACE_S: Final = 20.0
"""How long answers are waited for once the last request is out; what has none by then has failed."""
PROGRESS_S: Final = 5.0
RETRY_S: Final = 1.0
"""How long a user of the closed loop waits after a failure, so that a server that is gone is not run against."""


@dataclass(slots=True)
class Tally:
    """What came of the requests so far. Latencies in seconds from sending."""

    sent: int = 0
    failed: int = 0
    tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    """Of streamed requests."""
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def completed(self) -> int:
        return len(self.latencies_s)

    def fail(self, why: str) -> None:
        self.failed += 1
        self.errors[why] = self.errors.get(why, 0) + 1

    def document(self, seconds: float) -> dict[str, Any]:
        """Return the line printed at the end; `seconds` is the time the tokens took to come."""
        return {
            "schema": SCHEMA,
            "completed": self.completed,
            "failed": self.failed,
            "tokens": self.tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(self.tokens / seconds, 2) if seconds > 0 else 0.0,
            "latency_s": percentiles(self.latencies_s),
            "first_token_s": percentiles(self.first_token_s),
            "errors": self.errors,
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 by nearest rank; nothing of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 4) for p in (50, 95, 99)}


class Sender:
    """Sends planned requests to one server and counts what comes back."""

    def __init__(self, client: Any, model: str) -> None:
        self.tally = Tally()
        self._client = client  # httpx.AsyncClient, imported only when a run begins
        self._model = model

    async def send(self, planned: Planned) -> bool:
        """Send one request and count its end: True for an answer. Errors are counted by their text, never raised."""
        import httpx

        body: dict[str, Any] = {
            "model": self._model,
            "prompt": planned.prompt,
            "max_tokens": planned.max_tokens,
            "temperature": 0,
        }
        headers = {"insitu": "capture=rows"} if planned.capture else {}
        began = time.monotonic()
        self.tally.sent += 1
        try:
            send = self._streamed if planned.stream else self._plain
            tokens = await send(body, headers, began)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.tally.fail(f"{type(error).__name__}: {error}"[:200])
            return False
        self.tally.tokens += tokens
        self.tally.latencies_s.append(time.monotonic() - began)
        return True

    async def _plain(self, body: dict[str, Any], headers: dict[str, str], began: float) -> int:
        answer = await self._client.post("/v1/completions", json=body, headers=headers)
        if answer.status_code != 200:
            raise ValueError(_error_text(answer.status_code, answer.text))
        return int(answer.json()["usage"]["completion_tokens"])

    async def _streamed(self, body: dict[str, Any], headers: dict[str, str], began: float) -> int:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        num_chunks, usage, is_done = 0, None, False
        async with self._client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                raise ValueError(_error_text(answer.status_code, (await answer.aread()).decode(errors="replace")))
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    is_done = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ValueError(str(event["error"].get("message", event["error"])))
                usage = event.get("usage") or usage
                if event.get("choices"):
                    num_chunks += 1
                    if num_chunks == 1:
                        self.tally.first_token_s.append(time.monotonic() - began)
        if not is_done:
            raise ValueError("the stream ended before its [DONE]")
        return int(usage["completion_tokens"]) if usage else num_chunks


def _error_text(status: int, text: str) -> str:
    try:
        return f"{status}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {text[:100]}"


async def run_load(
    url: str, planned: Sequence[Planned] | Iterator[Planned], seconds: float, progress: bool, concurrency: int = 0
) -> dict[str, Any]:
    """Send everything at its time, wait for the answers, return the document. Raises ClickException, one line.

    concurrency: 0, or how many users send what an iterator yields in a closed loop, its times left out.
    """
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=16)
    async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(60.0), limits=limits) as client:
        try:
            models = (await client.get("/v1/models")).json()
            sender = Sender(client, models["data"][0]["id"])
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            said = str(error) or type(error).__name__
            raise click.ClickException(f"no server answers at {url} ({said}); start `insitu serve`") from error
        began = time.monotonic()
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        reporter = asyncio.create_task(_report(sender.tally, began)) if progress else None
        requests, end = iter(planned), began + seconds
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(_use(sender, requests, stop, end)) for _ in range(concurrency)
        ]
        for request in () if concurrency else requests:
            if await _set_within(stop, began + request.at_s - time.monotonic()):
                break
            tasks.append(asyncio.create_task(sender.send(request)))
        await _set_within(stop, end - time.monotonic())
        await _settle(tasks, sender.tally, stop)
        if reporter is not None:
            reporter.cancel()
        return sender.tally.document(time.monotonic() - began)


async def _use(sender: Sender, requests: Iterator[Planned], stop: asyncio.Event, end_s: float) -> None:
    """Be one user of a closed loop: send the next request as soon as the last is answered, until `end_s`."""
    while not stop.is_set() and time.monotonic() < end_s:
        if not await sender.send(next(requests)):
            await _set_within(stop, RETRY_S)


async def _set_within(stop: asyncio.Event, timeout_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), max(0.0, timeout_s))
    return stop.is_set()


async def _settle(tasks: Sequence[asyncio.Task[Any]], tally: Tally, stop: asyncio.Event) -> None:
    """Wait for the answers that are still out. Who is told to stop gives them up, and they have not failed."""
    stopped = asyncio.create_task(stop.wait())
    answered = asyncio.gather(*tasks)
    await asyncio.wait((stopped, answered), timeout=GRACE_S, return_when=asyncio.FIRST_COMPLETED)
    late = [task for task in tasks if not task.done()]
    for task in late:
        task.cancel()
        if not stop.is_set():
            tally.fail(f"no answer {GRACE_S:.0f} s after the last request was sent")
    stopped.cancel()
    await asyncio.gather(answered, return_exceptions=True)


async def _report(tally: Tally, began: float) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        waiting = tally.sent - tally.completed - tally.failed
        passed = time.monotonic() - began
        click.echo(
            f"{passed:.0f} s: {tally.completed} answered, {waiting} in flight, {tally.failed} failed, "
            f"{tally.tokens / passed:.0f} tokens/s",
            err=True,
        )


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file, one a line. Raises ClickException when there are none."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"cannot read prompts from {path}: {error}") from error
    if not prompts:
        raise click.ClickException(f"{path} holds no prompt; write one a line")
    return prompts


@click.command()
@click.option("--url", required=True, help="The server, e.g. http://127.0.0.1:8000.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=30.0, show_default=True, help="How long to send.")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes what is sent and when.")
@click.option("--rate", type=click.FloatRange(min=0.01), help=f"A second.  [default: {DEFAULT_RATE}]")
@click.option("--concurrency", type=click.IntRange(min=1), help="Users, each sending again once answered; no --rate.")
@click.option("--prompts", type=click.Path(path_type=Path), help="A file with one prompt a line.")
@click.option("--progress/--quiet", default=None, help="A line on stderr now and then (default: on a terminal).")
def load(
    url: str,
    seconds: float,
    seed: int,
    rate: float | None,
    concurrency: int | None,
    prompts: Path | None,
    progress: bool | None,
) -> None:
    """Send prompts of mixed lengths at random times to a server, and print what came of them as one JSON line.

    With `insitu serve` running on its usual port:

    \b
    insitu load --url http://127.0.0.1:8000 --seconds 3
    insitu load --url http://127.0.0.1:8000 --seconds 3 --rate 8 --seed 3
    insitu load --url http://127.0.0.1:8000 --seconds 3 --concurrency 8
    """
    if rate is not None and concurrency is not None:
        raise click.UsageError("--rate sends at times of its own and --concurrency when answers come; give one of them")
    own = read_prompts(prompts) if prompts else ()
    planned = endless(seed, own) if concurrency else plan(seed, rate or DEFAULT_RATE, seconds, own)
    shown = sys.stderr.isatty() if progress is None else progress
    click.echo(json.dumps(asyncio.run(run_load(url, planned, seconds, shown, concurrency or 0))))
