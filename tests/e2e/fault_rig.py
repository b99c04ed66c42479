"""The system that the tests of faults share: a collector with its judge, and an engine whose KV memory is scarce."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from fault_kit import left_of, new_run
from live_system import MODEL, Process

from insitu_collector.store import open_store


def start_collector(store: Path, run: str, port: int = 0) -> tuple[Process, int]:
    """Start `insitu collect --judge`; return it and its port once it listens."""
    options = ["--store", str(store), "--port", str(port), "--judge"]
    collect = Process(["-m", "insitu", "collect", *options], {"INSITU_RUN": run})
    return collect, int(collect.wait_for(r"collecting on grpc://127\.0\.0\.1:(\d+) into")[1])


class Engine:
    """A two-stage engine that ships to a collector; `url` waits until it is ready."""

    def __init__(self, run: str, collector_port: int, *options: str) -> None:
        self.run = run
        to = f"grpc://127.0.0.1:{collector_port}"
        command = ["-m", "insitu", "serve", "--stages", "2", "--model", str(MODEL), "--port", "0", "--to", to, *options]
        self.process = Process(command, {"INSITU_RUN": run})

    @cached_property
    def url(self) -> str:
        return self.process.wait_for(r"ready on (http://[\w.:]+)")[1]

    @property
    def ranks(self) -> list[psutil.Process]:
        """Its ranks' processes, in order."""
        return sorted(psutil.Process(self.process.process.pid).children(), key=lambda rank: rank.pid)


class Rig:
    """A collector with its judge and an engine; the collector may be another one after a while."""

    def __init__(self, disk: Path, is_small: bool) -> None:
        self.disk, self.is_small = disk, is_small
        self.store = disk / "store"
        self.run = new_run()
        self.sources: list[dict[str, Any]] = []
        """Accounts of processes that have ended."""
        self.collect, self.port = start_collector(self.store, self.run)
        # As little memory for keys and values as makes the longest request need all of it.
        self.engine = Engine(self.run, self.port, "--kv-mib", "1")

    @property
    def url(self) -> str:
        return self.engine.url

    def revive(self) -> None:
        """Start a collector again where the last one was."""
        self.collect, _ = start_collector(self.store, self.run, self.port)

    def judge(self, not_pid: int = 0) -> psutil.Process | None:
        """Return the collector's judge, other than `not_pid`, if it has one now."""
        with suppress(psutil.Error):
            for child in psutil.Process(self.collect.process.pid).children():
                if child.pid != not_pid and "judge" in child.cmdline():
                    return child
        return None

    def rows(self, table: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = open_store(self.store).table(table).to_pylist()
        return found

    def end(self) -> list[str]:
        """Stop both; return what is left."""
        for process in (self.engine.process, self.collect):
            process.stop()
        return left_of(self.run)
