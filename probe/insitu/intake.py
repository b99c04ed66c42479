"""How much a collector takes, and of whom, as settings say it. Loads nothing heavy (docs/collector.md, "Limits")."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from insitu.segments.retention import age_text, bytes_text, parse_age, parse_bytes

MAX_FRAME_BYTES: Final = 32 << 20
"""Largest body of a frame that the wire allows."""
LEAST_FRAME_BYTES: Final = 64 << 10
_TENANT: Final = re.compile(r"[a-z0-9_-]{1,64}")


def _size(value: Any) -> int | None:
    return parse_bytes(str(value))


def _time(value: Any) -> float | None:
    return parse_age(str(value))


def _count(value: Any) -> int | None:
    text = str(value).strip().lower()
    if text == "none":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{value!r} is no count; write a whole number from 1")
    return int(text)


_PARSE: Final[dict[str, Callable[[Any], Any]]] = {"size": _size, "time": _time, "count": _count}


def _of(kind: str, default: Any, *, may_be_none: bool = False) -> Any:
    return field(default=default, metadata={"kind": kind, "may_be_none": may_be_none})


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """What bounds all callers together, and each stream. Sizes in bytes, times in seconds."""

    frame: int = _of("size", MAX_FRAME_BYTES)
    """Largest body of a frame; a larger one is refused for good."""
    streams: int = _of("count", 256)
    """Probes connected at once."""
    in_flight: int = _of("size", 256 << 20)
    """Received and not yet written."""
    memory: int | None = _of("size", 2 << 30, may_be_none=True)
    """Resident memory beyond which frames are received one at a time."""
    handshake: float = _of("time", 5.0)
    """From the call to its Hello."""
    idle: float = _of("time", 60.0)
    """Longest silence of a stream."""
    grace: float = _of("time", 5.0)
    """Longest a frame waits for its tenant's quota; it is refused, to be sent again, where it would be longer."""
    labels: int = _of("count", 128)
    """Labels of a source."""
    label: int = _of("size", 4 << 10)
    """Largest name, and largest value, of a label."""

    def __post_init__(self) -> None:
        if not LEAST_FRAME_BYTES <= self.frame <= MAX_FRAME_BYTES:
            least, most = bytes_text(LEAST_FRAME_BYTES), bytes_text(MAX_FRAME_BYTES)
            raise ValueError(f"a frame of {bytes_text(self.frame)} is not possible; write from {least} to {most}")
        if self.in_flight < self.frame:
            raise ValueError(f"in_flight={bytes_text(self.in_flight)} holds no frame of {bytes_text(self.frame)}")


@dataclass(frozen=True, slots=True)
class Quota:
    """What one tenant may have. None: as much as there is."""

    bytes_per_s: int | None = _of("size", None, may_be_none=True)
    rows_per_s: int | None = _of("count", None, may_be_none=True)
    frames_per_s: int | None = _of("count", None, may_be_none=True)
    streams: int = _of("count", 256)
    in_flight: int = _of("size", 64 << 20)
    """Received and not yet written, in bytes."""


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quota of each tenant that has one of its own, and that of all others."""

    others: Quota = field(default_factory=Quota)
    by_tenant: Mapping[str, Quota] = field(default_factory=dict)

    def of(self, tenant: str) -> Quota:
        """Return a tenant's quota."""
        return self.by_tenant.get(tenant, self.others)


@dataclass(frozen=True, slots=True)
class Intake:
    """All that bounds what a collector takes."""

    limits: IntakeLimits = field(default_factory=IntakeLimits)
    quotas: Quotas = field(default_factory=Quotas)


def parse_limits(value: Any) -> IntakeLimits:
    """Return limits from `frame=4MiB,streams=64` or a table of the same keys. Raises ValueError, one line."""
    return value if isinstance(value, IntakeLimits) else IntakeLimits(**_fields(IntakeLimits, value, "limit"))


def parse_quotas(value: Any) -> Quotas:
    """Return quotas from a list of `[TENANT:]bytes_per_s=8MiB,streams=32`, or such texts with spaces between.

    Without a tenant it is that of everybody who has none of their own. Raises ValueError, one line.
    """
    if isinstance(value, Quotas):
        return value
    texts = value.split() if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{value!r} is no list of quotas; write it like team-a:bytes_per_s=8MiB,streams=32")
    others, named = Quota(), {}
    for text in texts:
        tenant, colon, rest = text.rpartition(":")
        quota = Quota(**_fields(Quota, rest, "quota"))
        if not colon:
            others = quota
        elif _TENANT.fullmatch(tenant):
            named[tenant] = quota
        else:
            raise ValueError(f"{tenant!r} is no tenant; its name has a-z, 0-9, _ and -, at most 64")
    return Quotas(others, named)


def _fields(kind: type[IntakeLimits] | type[Quota], value: Any, what: str) -> dict[str, Any]:
    known = {each.name: each.metadata for each in fields(kind)}
    found = {}
    for key, text in _pairs(value, what).items():
        if key not in known:
            raise ValueError(f"there is no {what} {key!r}; there are {', '.join(known)}")
        found[key] = _PARSE[known[key]["kind"]](text)
        if found[key] is None and not known[key]["may_be_none"]:
            raise ValueError(f"{key} cannot be none")
    return found


def _pairs(value: Any, what: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    pairs = [part.partition("=") for part in str(value).split(",") if part.strip()]
    if not pairs or not all(equals for _, equals, _ in pairs):
        raise ValueError(f"{value!r} is no {what}; write it like key=value,key=value")
    return {key.strip(): text.strip() for key, _, text in pairs}


def limits_text(limits: IntakeLimits) -> str:
    """Return limits as `parse_limits` reads them: those that are no defaults; all of them where none is."""
    return _text(limits, IntakeLimits())


def quotas_text(quotas: Quotas) -> str:
    """Return quotas as `parse_quotas` reads them."""
    named = [f"{tenant}:{_text(quota, Quota())}" for tenant, quota in sorted(quotas.by_tenant.items())]
    return " ".join([_text(quotas.others, Quota()), *named])


def _text(values: Any, defaults: Any) -> str:
    all_of = [(each.name, each.metadata["kind"], getattr(values, each.name)) for each in fields(values)]
    told = [each for each in all_of if each[2] != getattr(defaults, each[0])] or all_of
    words = {"size": bytes_text, "time": age_text, "count": lambda count: "none" if count is None else str(count)}
    return ",".join(f"{name}={words[kind](value)}" for name, kind, value in told)
