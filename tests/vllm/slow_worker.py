"""A worker class of a user's own, for `vllm serve --worker-cls slow_worker.SlowWorker`: its last stage can be slowed.

While the file named by SLOW_WHILE exists, each forward of the last stage takes SLOW_MS longer.
"""

from __future__ import annotations

import os
import time
from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class SlowWorker(CPUWorker):  # type: ignore[misc]
    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if not get_pp_group().is_last_rank:
            return
        inner, slow_s = self.model_runner.model.forward, float(os.environ["SLOW_MS"]) / 1e3
        marker = os.environ["SLOW_WHILE"]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if os.path.exists(marker):
                until = time.monotonic() + slow_s
                while time.monotonic() < until:
                    pass
            return inner(*args, **kwargs)

        self.model_runner.model.forward = forward
