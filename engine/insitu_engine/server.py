"""The life of `insitu serve`: ranks loaded, warmed up, serving, drained, stopped."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

import insitu
from insitu.config import load
from insitu.destinations import scheme_of
from insitu_engine import api
from insitu_engine.calibrate import warm_up
from insitu_engine.config import EngineConfig
from insitu_engine.driver import Driver
from insitu_engine.errors import EngineError, say
from insitu_engine.launcher import Launched
from insitu_engine.links import end_ranks
from insitu_engine.text import open_tokenizer

STOP_RANKS_S = 8.0
"""How long ranks may take to flush their probes and exit before they are killed."""
KEEP_ALIVE_S = 75
"""How long a connection may be idle: longer than clients keep one (httpx 5 s) and than balancers do (commonly 60 s).
Who closes first must be the client, or a request meets a connection that is just being closed."""


class _Server(uvicorn.Server):
    """A uvicorn that leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(config: EngineConfig, launched: Launched, listener: socket.socket, began_s: float) -> None:
    """Serve until told to stop; print the account of records. Raises EngineError when a rank ends by itself."""
    session = insitu.off()
    if config.to is not None:
        try:
            session = insitu.start(to=config.to, role="driver", model=launched.checkpoint.name)
        except (OSError, ValueError) as error:
            raise EngineError(f"--to {config.to} cannot be used: {' '.join(str(error).split())}") from None
        if scheme_of(config.to) == "file":
            say(f"{config.to} keeps {load().keep}, each process its own; INSITU_KEEP_BYTES, INSITU_KEEP_FOR change it")
    life = _Life(config, launched, listener, session, began_s)
    try:
        asyncio.run(life.run())
    finally:
        # It is ending already: one more signal must not cut short what is still to be made durable.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        session.close()
        # After a failure too; a rank that was killed has no account to give.
        sources = [session.stats().to_json(), *life.rank_stats()]
        print(json.dumps({"schema": "insitu.serve/1", "sources": sources}), flush=True)


class _Life:
    def __init__(
        self,
        config: EngineConfig,
        launched: Launched,
        listener: socket.socket,
        session: insitu.Session,
        began_s: float,
    ) -> None:
        self._config = config
        self._launched = launched
        self._listener = listener
        self._began_s = began_s
        checkpoint = launched.checkpoint
        self._driver = Driver(launched.plan.limits, session)
        self._service = api.Service(
            driver=self._driver,
            model=checkpoint.name,
            vocab_size=checkpoint.config.vocab_size,
            end_ids=checkpoint.end_ids,
            max_len=launched.plan.max_len,
            created=int(time.time()),
        )
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Serve until told to stop. Raises EngineError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        http = _Server(
            uvicorn.Config(
                api.build(self._service),
                lifespan="off",
                log_level="critical",
                access_log=False,
                timeout_graceful_shutdown=2,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        try:
            await self._driver.connect(self._launched)
            await self._until_stopped()
        finally:
            self._driver.stop_ranks()
            http.should_exit = True
            await serving
            await end_ranks(self._driver.links, STOP_RANKS_S)

    def rank_stats(self) -> list[dict[str, object]]:
        """Return the accounts of the ranks that gave one, once `run` is over."""
        return [self._driver.stats[rank] for rank in sorted(self._driver.stats)]

    async def _until_stopped(self) -> None:
        """Get ready and serve until a signal or a failure; then drain. Raises EngineError for a failure."""
        stop = asyncio.create_task(self._stop.wait())
        failed = asyncio.create_task(self._driver.failed())
        ready = asyncio.create_task(self._get_ready())
        try:
            await asyncio.wait((stop, failed, ready), return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not failed.done():
                ready.result()
                await asyncio.wait((stop, failed), return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise EngineError(failed.result())
            await self._drain(failed)
        finally:
            for task in (stop, failed, ready):
                task.cancel()
            await asyncio.gather(stop, failed, ready, return_exceptions=True)

    async def _get_ready(self) -> None:
        driver, plan = self._driver, self._launched.plan
        self._service.tokenizer = open_tokenizer(self._launched.checkpoint.path)
        await driver.loaded()
        driver.status = "warming"
        await warm_up(driver, plan.max_len, self._service.vocab_size)
        driver.end_warmup()
        gc.collect()
        gc.freeze()
        driver.status = "ready"
        host, port = self._listener.getsockname()[:2]
        stages = f"{len(plan.layers)} stage{'s' if len(plan.layers) > 1 else ''}"
        layers = ",".join(str(len(layers)) for layers in plan.layers)
        took = time.monotonic() - self._began_s
        say(f"ready on http://{host}:{port} ({self._service.model}, {stages}, layers {layers}, {took:.1f} s)")

    async def _drain(self, failed: asyncio.Task[str]) -> None:
        """Refuse what comes, let what is in flight finish within the grace, end the rest with a reason."""
        driver = self._driver
        if driver.status == "ready":
            driver.status = "draining"
        self._stop.clear()
        drained = asyncio.create_task(driver.drained())
        again = asyncio.create_task(self._stop.wait())
        await asyncio.wait((drained, again, failed), timeout=self._config.grace_s, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        again.cancel()
        if failed.done():
            raise EngineError(failed.result())
        driver.abort_all("the server is stopping and this request did not finish in time")
