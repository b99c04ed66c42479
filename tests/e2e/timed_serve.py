"""`insitu serve`, with a stopwatch of its own around every forward of a stage.

Run as a script by the tests. Each call appends two int64 (begin and end, CLOCK_MONOTONIC ns) to the file
`$STOPWATCH.<stage start layer>`: an account of compute that shares nothing with the probe's.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from typing import Any

from insitu.cli import main
from insitu_engine.stage import Stage

_files: dict[int, int] = {}
_forward = Stage.forward


def forward(self: Stage, *args: Any, **kwargs: Any) -> Any:
    first = self.layer_range.start
    if first not in _files:
        _files[first] = os.open(f"{os.environ['STOPWATCH']}.{first}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    began = time.monotonic_ns()
    output = _forward(self, *args, **kwargs)
    os.write(_files[first], struct.pack("=2q", began, time.monotonic_ns()))
    return output


Stage.forward = forward  # type: ignore[method-assign]
sys.argv[0] = "insitu"
main()
