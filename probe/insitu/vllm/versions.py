"""Which vLLM this is, and which of its modes are not observed, and why. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

TESTED: Final = ((0, 32),)
"""Versions that the tests ran. vLLM moves its inner parts every few weeks: another one is refused, not tried."""
RUNNER: Final = ("_model_forward", "execute_model", "sample_tokens", "input_batch", "query_start_loc")
"""What the first generation of runners has (V1), by which it is known. The second has not the first of these."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that is not observed."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what} not observed: {self.why}"


ROWS_TOO: Final = "tensors and row maps"
TENSORS: Final = "tensors"
CAPTURES: Final = "rows of requests"


def refused_version(version: str) -> str | None:
    """Return why this version of vLLM is not observed; None where it is."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and (int(found[1]), int(found[2])) in TESTED:
        return None
    known = ", ".join(f"{major}.{minor}" for major, minor in TESTED)
    return f"vLLM {version} is not known here (known: {known}); nothing is observed, and vLLM runs as without insitu"


def refused_runner(runner: Any) -> str | None:
    """Return why this model runner is not observed; None where it is."""
    missing = [name for name in RUNNER if not hasattr(runner, name)]
    if not missing:
        return None
    cls = type(runner)
    return (
        f"the runner {cls.__module__}.{cls.__name__} is of another generation (it has no {', '.join(missing)}); "
        "this rank is not observed; where the model allows it, VLLM_USE_V2_MODEL_RUNNER=0 chooses one that is"
    )


def limits_of(config: Any) -> Sequence[Limit]:
    """Return what cannot be told in the modes that are on. config: vLLM's own, `VllmConfig`."""
    found = []
    if getattr(config, "speculative_config", None) is not None:
        found.append(Limit(ROWS_TOO, "speculative decoding is on, whose rows may be taken back"))
    if getattr(config.parallel_config, "use_ubatching", False):
        found.append(Limit(ROWS_TOO, "micro-batch overlap is on, which runs a step's rows in two forwards"))
    if getattr(config.model_config, "runner_type", "generate") != "generate":
        found.append(Limit(ROWS_TOO, f"a {config.model_config.runner_type} model makes no tokens"))
    return found
