"""Where a collector is: `grpc://HOST:PORT`, or with TLS `grpcs://HOST:PORT`. Pure."""

from __future__ import annotations

import ipaddress
from typing import Final, NamedTuple

PLAIN: Final = "grpc"
SECURE: Final = "grpcs"
SCHEMES: Final = (PLAIN, SECURE)


class Address(NamedTuple):
    """A collector: `target` as gRPC takes it, and whether it is spoken to over TLS."""

    target: str
    is_secure: bool

    @classmethod
    def of(cls, text: str) -> Address:
        """Return what a URL says, or HOST:PORT alone, which is without TLS. Raises ValueError, one line."""
        scheme, mark, rest = text.partition("://")
        scheme = scheme.lower()
        if not mark:
            scheme, rest = PLAIN, text
        if scheme not in SCHEMES:
            raise ValueError(f"{text} is no collector; write it like grpc://127.0.0.1:4317, with TLS grpcs://HOST:4317")
        target = rest.partition("/")[0]
        if not target.rpartition(":")[2].isdigit():
            name = f"{scheme}://{target}" if mark else target
            raise ValueError(f"destination {name} has no port; the usual one is {name}:4317")
        if not 0 < int(target.rpartition(":")[2]) <= 65535:
            raise ValueError(f"destination {text}: there is no such port; write one from 1 to 65535")
        return cls(target, scheme == SECURE)

    def __str__(self) -> str:
        return f"{SECURE if self.is_secure else PLAIN}://{self.target}"

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent there stays on this host."""
        return is_loopback(self.target.rpartition(":")[0])


def is_loopback(host: str) -> bool:
    """Return whether only this host's processes reach what listens there. A name is none, `localhost` excepted."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
