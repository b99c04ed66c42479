"""The other end of `workers.Worker`: a process that does what it is asked for, a JSON line at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any


def serve(make: Callable[[], Any]) -> None:
    """Answer until there is nothing more to read: `{"do": "block", ...}` calls `do_block(...)` of what `make` returns.

    What a request raises is its answer: the driver decides whether it can do without.
    """
    answers = _own_stdout()
    made = make()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = getattr(made, f"do_{request.pop('do')}")(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def _own_stdout() -> IO[str]:
    """Return what the driver reads; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers
