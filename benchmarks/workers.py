"""Starts processes that run what they are asked for (`worker_loop.py`), and asks them one at a time: only one works."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ANSWER_S: Final = 300.0
"""The longest that one answer may take: graphs of a dozen layers are compiled within one."""
NUM_LAST: Final = 3
"""Lines of a process's stderr that are told of its death."""


class WorkerError(Exception):
    """A process could not do what it was asked for, or is gone; the message is its own."""


class Worker:
    """One process that runs variants; a context manager."""

    def __init__(
        self,
        python: Path | str,
        job: Mapping[str, Any],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        script: str = "probe_worker.py",
    ) -> None:
        """job: what the script takes (fields of `probe_variants.Job`) but `folder`, which is made here.

        environment: over this process's.
        """
        folder.mkdir(parents=True)
        self._log = folder / "stderr"
        asked = json.dumps({**job, "folder": str(folder)})
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(HERE / script), asked],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", **(environment or {})},
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Return the answer to one request. Raises WorkerError."""
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        watchdog = Timer(ANSWER_S, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            raise WorkerError(f"the process is gone: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """Let the process end by itself; kill one that does not."""
        with suppress(WorkerError):
            self.ask("close")
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-NUM_LAST:]) or "it said nothing"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
