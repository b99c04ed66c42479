"""How what the collector starts itself is let in: by a token of its own, which is in no file and on no command line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from insitu_collector.access.gate import Gate
from insitu_collector.access.roles import Role


@dataclass(frozen=True, slots=True)
class Child:
    """What a child process is given."""

    address: str
    """Where the collector is."""
    environment: Mapping[str, str] = field(default_factory=dict)
    fds: tuple[int, ...] = ()
    """Files that it inherits."""


@contextmanager
def let_in(gate: Gate, address: str, name: str, *roles: Role) -> Iterator[Child]:
    """Yield what a child needs to call `address`, a port of this host; good for as many as come while it lasts."""
    number = os.memfd_create(f"insitu-token-{name}")
    try:
        os.fchmod(number, 0o600)
        os.write(number, gate.child_token(name, *roles).encode())
        yield Child(address, {"INSITU_TOKEN_FILE": f"/proc/self/fd/{number}"}, (number,))
    finally:
        os.close(number)
