"""Where a collector is: `grpc://HOST:PORT`, or with TLS `grpcs://HOST:PORT`. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

PLAIN: Final = "grpc"
SECURE: Final = "grpcs"
SCHEMES: Final = (PLAIN, SECURE)
_FURTHER: Final = re.compile(r"[/?#]")
"""What would begin a path, a query or a fragment."""


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
        target = _FURTHER.split(rest, maxsplit=1)[0]
        name, port = f"{scheme}://{target}" if mark else target, _port_of(target)
        if not port:
            name = name.removesuffix(":")
            raise ValueError(f"destination {name} has no port; the usual one is {name}:4317")
        if not (port.isascii() and port.isdigit()):
            raise ValueError(f"destination {name}: the port {port!r} is no number; the usual one is 4317")
        if len(port) > 5 or not 0 < int(port) <= 65535:
            raise ValueError(f"destination {text}: there is no such port; write one from 1 to 65535")
        if rest not in (target, f"{target}/"):
            raise ValueError(f"destination {text}: a collector has no path and no query; write {name}")
        return cls(target, scheme == SECURE)

    def __str__(self) -> str:
        return f"{SECURE if self.is_secure else PLAIN}://{self.target}"

    @property
    def is_loopback(self) -> bool:
        """Whether what is sent there stays on this host."""
        return is_loopback(self.target.rpartition(":")[0])


def _port_of(target: str) -> str:
    """Return what stands for a port; "" where nothing does: the colons of [::1] are the host's."""
    return target.rpartition("]")[2].rpartition(":")[2] if ":" in target.rpartition("]")[2] else ""


def is_loopback(host: str) -> bool:
    """Return whether only this host's processes reach what listens there. A name is none, `localhost` excepted."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
