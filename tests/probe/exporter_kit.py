"""An exporter that hangs, for tests of several parts of the probe."""

from __future__ import annotations

import threading

from insitu.exporters.base import Ack, Batch
from insitu.testing import Recording


class Hanging(Recording):
    """Does not come back from `export` before `let_go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_hanging, self.let_go = threading.Event(), threading.Event()

    def export(self, batch: Batch) -> Ack:
        if not self.let_go.is_set():
            self.is_hanging.set()
            self.let_go.wait(60)
        return super().export(batch)
