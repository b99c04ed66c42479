"""Who writes a row: the run, the process's epoch, and the one `sources` row that describes it."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from insitu.vocabulary import NO_RANK, Role

RUN_VARIABLE = "INSITU_RUN"


@cache
def package_version() -> str:
    """Return the installed version of insitu, or "unknown" where it runs from a bare source tree."""
    try:
        return version("insitu")
    except PackageNotFoundError:
        return "unknown"


def current_run() -> str:
    """Return this run's 16 hex digits; the first process makes them, its children inherit them."""
    return os.environ.setdefault(RUN_VARIABLE, secrets.token_hex(8))


def boot_id() -> str:
    """Return the kernel's boot id: processes that share it share one CLOCK_MONOTONIC."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown-{socket.gethostname()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One process that writes rows. Becomes one row of `sources`; its epoch stands in every other row."""

    epoch: int = field(default_factory=lambda: secrets.randbits(64))
    run: str = field(default_factory=current_run)
    role: Role = Role.RANK
    host: str = field(default_factory=socket.gethostname)
    boot_id: str = field(default_factory=boot_id)
    pid: int = field(default_factory=os.getpid)
    replica: int = 0
    rank: int = 0
    stage: int = 0
    dp_rank: int = 0
    tp_rank: int = 0
    pp_rank: int = 0
    ep_rank: int = 0
    model: str | None = None
    config_digest: str | None = None
    plan_digest: str | None = None
    param_bytes: int | None = None
    version: str = field(default_factory=package_version)
    unix_anchor_ns: int = field(default_factory=time.time_ns)
    mono_anchor_ns: int = field(default_factory=time.monotonic_ns)

    @classmethod
    def without_rank(cls, role: Role, **fields: Any) -> Source:
        """Return the source of a process outside the rank grid (driver, client)."""
        return cls(role=role, rank=NO_RANK, stage=NO_RANK, **fields)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Source:
        """Return the source that a row of the table `sources` describes; columns of later versions are left out."""
        known = {name: row[name] for name in cls.__dataclass_fields__ if row.get(name) is not None}
        return cls(**{**known, "role": Role(row["role"])})

    def after_fork(self) -> Source:
        """Return the identity of a forked child: the same place in the grid, a new epoch."""
        return replace(
            self,
            epoch=secrets.randbits(64),
            pid=os.getpid(),
            unix_anchor_ns=time.time_ns(),
            mono_anchor_ns=time.monotonic_ns(),
        )

    def unix_ns(self, mono_ns: int) -> int:
        """Return the Unix time of a CLOCK_MONOTONIC time of this host."""
        return self.unix_anchor_ns + (mono_ns - self.mono_anchor_ns)

    def row(self) -> dict[str, Any]:
        """Return the `sources` row, without `row_seq`."""
        return {**asdict(self), "role": str(self.role)}

    def labels(self) -> dict[str, str]:
        """Return what the wire's Hello says of this process."""
        return {key: str(value) for key, value in self.row().items() if value is not None}
