"""Faults made on purpose. An injector acts on the world inside its rank and tells nobody but its own log.

The spec reaches a rank by the environment it inherits: `INSITU_ENGINE_FAULTS`, a JSON list of SPEC. What was done is
appended to the file `INSITU_ENGINE_FAULT_LOG`, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

FAULTS_VARIABLE: Final = "INSITU_ENGINE_FAULTS"
LOG_VARIABLE: Final = "INSITU_ENGINE_FAULT_LOG"
STEADY_S: Final = 5.0
"""When a slow stage or collections begin unless the spec says: seconds after the first traffic."""
HANG_S: Final = 6.0

_FORMS: Final = {
    "slow-stage": "slow-stage=STAGE:MS",
    "nan": "nan=LAYER:STEP",
    "gc": "gc=RANK",
    "hang": "hang=RANK:STEP[:SECONDS]",
}
_SHAPE: Final = re.compile(r"(?P<kind>[a-z-]+)=(?P<values>[^@]*)(?:@(?P<start>[0-9.]+)(?:-(?P<end>[0-9.]+))?)?")
_WHOLE: Final = re.compile(r"\d+")
_DECIMAL: Final = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. Fields that do not belong to its kind are None."""

    kind: str
    """`slow_stage`, `nan`, `gc` or `hang`."""
    stage: int | None = None
    rank: int | None = None
    layer: int | None = None
    step: int | None = None
    """Counted from the end of warm-up."""
    ms: float | None = None
    """How long each step of a slow stage, or the hang, is blocked."""
    start_s: float = 0.0
    """Seconds after the first traffic."""
    end_s: float | None = None


def parse_fault(text: str) -> Fault:
    """Return the fault a SPEC means. Raises ValueError, in one line, for anything else."""
    found = _SHAPE.fullmatch(text)
    forms = ", ".join(_FORMS.values())
    if found is None or found["kind"] not in _FORMS:
        raise ValueError(f"fault {text!r} is not known; it may be {forms}, each with @START[-END] in seconds")
    kind = found["kind"]
    values = found["values"].split(":")
    start, end = _seconds(text, found["start"]), _seconds(text, found["end"])
    if start is not None and end is not None and end <= start:
        raise ValueError(f"fault {text!r} ends before it starts; write @START-END with END after START")
    if kind == "slow-stage" and _are(values, _WHOLE, _DECIMAL) and float(values[1]) > 0:
        return Fault(
            kind="slow_stage",
            stage=int(values[0]),
            ms=float(values[1]),
            start_s=STEADY_S if start is None else start,
            end_s=end,
        )
    if kind == "nan" and _are(values, _WHOLE, _WHOLE):
        return Fault(kind="nan", layer=int(values[0]), step=int(values[1]), start_s=start or 0.0, end_s=end)
    if kind == "gc" and _are(values, _WHOLE):
        return Fault(kind="gc", rank=int(values[0]), start_s=STEADY_S if start is None else start, end_s=end)
    if kind == "hang" and (_are(values, _WHOLE, _WHOLE) or _are(values, _WHOLE, _WHOLE, _DECIMAL)):
        ms = 1000 * (float(values[2]) if len(values) == 3 else HANG_S)
        return Fault(kind="hang", rank=int(values[0]), step=int(values[1]), ms=ms, start_s=start or 0.0, end_s=end)
    raise ValueError(f"fault {text!r} does not say what it must; write {_FORMS[kind]}, with whole numbers")


def _are(values: Sequence[str], *patterns: re.Pattern[str]) -> bool:
    return len(values) == len(patterns) and all(p.fullmatch(v) for p, v in zip(patterns, values, strict=True))


def _seconds(text: str, value: str | None) -> float | None:
    if value is None:
        return None
    if not _DECIMAL.fullmatch(value):
        raise ValueError(f"fault {text!r}: {value!r} is not a number of seconds")
    return float(value)


def inherited_faults(environ: Mapping[str, str] = os.environ) -> list[Fault]:
    """Return the faults this process inherited. Raises ValueError for a spec that cannot be read."""
    text = environ.get(FAULTS_VARIABLE)
    if not text:
        return []
    specs = json.loads(text)
    if not isinstance(specs, list):
        raise ValueError(f"{FAULTS_VARIABLE} is not a JSON list of faults")
    return [parse_fault(str(spec)) for spec in specs]


def forget_faults() -> None:
    """Drop the spec from this process's environment: from here on only the ranks know it."""
    os.environ.pop(FAULTS_VARIABLE, None)
    os.environ.pop(LOG_VARIABLE, None)


def check_faults(faults: Sequence[Fault], num_stages: int, num_layers: int) -> None:
    """Raise ValueError for a fault on a stage, rank or layer that is not there."""
    for fault in faults:
        named: dict[str, tuple[Any, int]] = {
            "stage": (fault.stage, num_stages),
            "rank": (fault.rank, num_stages),
            "layer": (fault.layer, num_layers),
        }
        for what, (number, size) in named.items():
            if number is not None and number >= size:
                raise ValueError(f"fault {fault.kind} names {what} {number}; there are {size}, counted from 0")
