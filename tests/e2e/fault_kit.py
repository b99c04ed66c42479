"""What tests of faults need: traffic that notices everything, the processes of a run, a small disk, and the account."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
from live_system import MODEL

from insitu_collector.store import open_store

PROMPT = "Once there was a brave farmer called Ada."
DEADLINE_S = 30.0


def new_run() -> str:
    """Return a run's id; every process of the run inherits it as INSITU_RUN."""
    return secrets.token_hex(8)


def processes_of(run: str) -> list[psutil.Process]:
    """Return the living processes of a run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("INSITU_RUN") == run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_of(run: str, timeout_s: float = 15.0) -> list[str]:
    """Return the command lines of what still lives of a run after `timeout_s`; kills them."""
    _, left = psutil.wait_procs(processes_of(run), timeout=timeout_s)
    said = [" ".join(process.cmdline()) for process in left]
    for process in left:
        process.kill()
    return said


class Stream:
    """One streamed completion: what came of it, and when each token did."""

    def __init__(self, url: str, max_tokens: int, prompt: str = PROMPT) -> None:
        self.came_s: list[float] = []
        self.finish: str | None = None
        self.error: dict[str, Any] | None = None
        """The error in OpenAI's shape, from the status or from the stream."""
        self.is_done = False
        self._url = url
        self._body = {"model": MODEL.name, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}

    def run(self, each: Callable[[float], None] = lambda _: None) -> Self:
        """Read to the end; `each` is told the time of every token. Raises httpx.HTTPError when the line breaks."""
        body = {**self._body, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=60) as answer:
            if answer.status_code != 200:
                self.error = json.loads(answer.read())["error"]
                return self
            for line in answer.iter_lines():
                self._take(line.removeprefix("data:").strip(), each)
        return self

    def _take(self, data: str, each: Callable[[float], None]) -> None:
        if data in ("", "[DONE]"):
            self.is_done = self.is_done or bool(data)
            return
        event = json.loads(data)
        self.error = event.get("error", self.error)
        for choice in event.get("choices", ()):
            self.came_s.append(time.monotonic())
            self.finish = choice["finish_reason"] or self.finish
            each(self.came_s[-1])

    @property
    def complaint(self) -> str | None:
        """What a client would complain of, if anything."""
        if self.error is not None:
            return str(self.error)
        return None if self.is_done and self.finish == "length" else f"ended early: {self.finish} {self.is_done}"


class Traffic:
    """Clients that stream completions one after another while the block runs, and miss nothing."""

    def __init__(self, url: str, num_clients: int = 3, max_tokens: int = 40) -> None:
        self.failures: list[str] = []
        self.num_answered = 0
        self.gaps: list[tuple[float, float]] = []
        """Of tokens that followed another: when (monotonic), and how long after it (s)."""
        self._url, self._max_tokens = url, max_tokens
        self._news = threading.Condition()
        self._over = threading.Event()
        self._clients = [threading.Thread(target=self._client) for _ in range(num_clients)]

    def __enter__(self) -> Self:
        for client in self._clients:
            client.start()
        self.goes_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for client in self._clients:
            client.join()

    def _client(self) -> None:
        while not self._over.is_set():
            stream = Stream(self._url, self._max_tokens)
            try:
                complaint = stream.run().complaint
            except (httpx.HTTPError, ValueError) as error:
                complaint = f"{type(error).__name__}: {error}"
            ends = stream.came_s[1:]
            with self._news:
                self.gaps += [(at, at - before) for before, at in zip(stream.came_s, ends, strict=False)]
                self.num_answered += complaint is None
                if complaint is not None:
                    self.failures.append(complaint)
                self._news.notify_all()

    def goes_on(self, num_more: int = 4) -> None:
        """Return once so many more requests were answered; fails when one failed."""
        with self._news:
            target = self.num_answered + num_more
            self._news.wait_for(lambda: self.num_answered >= target or self.failures, DEADLINE_S)
            assert self.failures == []
            assert self.num_answered >= target, f"only {self.num_answered} of {target} answers in {DEADLINE_S:.0f} s"

    def passes(self, seconds: float) -> tuple[float, float]:
        """Let a stretch of time pass, at most until a request fails; return when it began and ended."""
        began = time.monotonic()
        with self._news:
            self._news.wait_for(lambda: self.failures, seconds)
            assert self.failures == []
        return began, time.monotonic()

    def gaps_from(self, stretch: tuple[float, float]) -> list[float]:
        """Return the gaps (s) that began in a stretch, whenever they ended, of requests that are over."""
        with self._news:
            return [gap for at, gap in self.gaps if stretch[0] <= at - gap <= stretch[1]]


def accounts_in(stdout: str) -> list[dict[str, Any]]:
    """Return what every process whose account is printed there says of its rows."""
    documents = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    return [source for document in documents for source in document["sources"]]


def unbalanced(
    store: Path, sources: list[dict[str, Any]], orphans: list[dict[str, Any]] | None = None
) -> dict[str, tuple[int, int]]:
    """Return the tables of the sources whose rows produced are not stored + dropped, with both numbers.

    orphans: sources that gave up what a killed collector had not acknowledged. It may have stored that just before, so
    such rows may be in the store and among the dropped, but in neither none is.
    """
    opened = open_store(store)
    stored: Counter[tuple[int, str]] = Counter()
    for table in opened.tables():
        rows = opened.table(table)
        assert opened.damage == [], f"{table} cannot be read whole"
        stored.update((epoch, table) for epoch in rows["epoch"].to_pylist())
    wrong = {}
    for source in [*sources, *(orphans or [])]:
        for table, produced in source["produced"].items():
            found = stored[source["epoch"], table]
            kept = found + sum(source["dropped"].get(table, {}).values())
            if kept != produced and (source in sources or not found <= produced < kept):
                wrong[f"{source['role']} {source['rank']} {table}"] = (produced, kept)
    return wrong


def dropped_in(sources: list[dict[str, Any]]) -> Counter[str]:
    """Return the rows the sources count as dropped, by reason."""
    total: Counter[str] = Counter()
    for source in sources:
        for reasons in source["dropped"].values():
            total.update(reasons)
    return total
