"""Who calls the collector, and what they may do. Every service asks here before it does anything."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final
from urllib.parse import unquote

import grpc

LOCAL_PEERS: Final = ("ipv4:127.", "ipv6:[::1]:", "ipv6:[::ffff:127.", "unix:")


class Role(StrEnum):
    """What a caller may do."""

    SHIP = "ship"
    """Send records."""
    READ = "read"
    """Read the store."""
    ADMIN = "admin"
    """Change rules, look at them, and erase."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: `name` for the account of what was done, `tenant` whose records theirs are."""

    name: str
    tenant: str
    roles: frozenset[Role]


class Gate:
    """Tells who a call is from. A caller on the collector's own host may do everything, others may ship."""

    def caller(self, context: Any) -> Caller:
        """Return who calls."""
        peer = unquote(context.peer())
        is_local = peer.startswith(LOCAL_PEERS)
        return Caller(peer, "", frozenset(Role) if is_local else frozenset({Role.SHIP}))

    def require(self, context: Any, role: Role, remedy: str) -> Caller:
        """Return who calls; end the call with PERMISSION_DENIED and the remedy where the role is not theirs."""
        caller = self.caller(context)
        if role not in caller.roles:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, remedy)
        return caller
