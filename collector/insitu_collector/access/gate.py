"""Who calls the collector, and what they may do. Every service asks here before it does anything."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import grpc

from insitu.wire.channel import HEADER
from insitu_collector.access.audit import UNTOLD, Audit, Handshakes, Why
from insitu_collector.access.certificates import Certificates, TlsFiles, stamp
from insitu_collector.access.roles import Role
from insitu_collector.access.token_file import read_tokens
from insitu_collector.access.tokens import BadTokens, Entry, changes, digest_of, new_token, of_names, of_token

__all__ = ["Access", "Caller", "Gate", "Role"]

LOCAL_PEERS: Final = ("ipv4:127.", "ipv6:[::1]:", "ipv6:[::ffff:127.", "unix:")
LOOK_S: Final = 1.0
"""How often files are looked at: so long may a token that was taken out still work."""
_NEW_TOKEN: Final = "set INSITU_TOKEN_FILE to a file with one (`insitu token new` on the collector's host makes it)"


@dataclass(frozen=True, slots=True)
class Access:
    """What a collector's owner has said about who may call it."""

    tls: TlsFiles | None = None
    tokens: Path | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: `name` for the account of what was done, `tenant` whose records theirs are (empty: nobody's)."""

    name: str
    tenant: str
    roles: frozenset[Role]
    peer: str = ""
    """The address they call from."""
    entry: Entry | None = None
    """What let them in; None where no tokens file says who may."""

    def __str__(self) -> str:
        return self.name if self.name == self.peer else f"{self.name} at {self.peer}"


class _Unknown(Exception):
    """Nobody we know."""

    def __init__(self, why: Why, text: str) -> None:
        super().__init__(text)
        self.why = why
        self.text = text


class Gate:
    """Tells who a call is from.

    With a tokens file: whoever has a token of it, or a certificate that it names; where from does not matter. Without:
    callers on the collector's own host may do everything, others may ship. Safe for several threads.
    """

    def __init__(
        self,
        access: Access | None = None,
        tell: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """tell: stores the text of an audit event; raises OSError where it cannot now. Clocks: seconds.

        Raises BadTokens and BadCertificate, one line each.
        """
        self.access = access or Access()
        self._clock = clock
        self._unix_clock = unix_clock
        self._audit = Audit(tell, clock)
        self._handshakes = Handshakes()
        self._certificates = Certificates(self.access.tls) if self.access.tls else None
        self._lock = threading.Lock()
        self._children: tuple[Entry, ...] = ()
        self._stamp = stamp(self.access.tokens) if self.access.tokens else None
        self._entries = read_tokens(self.access.tokens) if self.access.tokens else ()
        self._said = ""
        self._looked_s = -LOOK_S
        self._streams: dict[object, tuple[Caller, Callable[[], None]]] = {}

    @property
    def is_guarded(self) -> bool:
        """Whether not everybody is let in."""
        return self.access.tls is not None or self.access.tokens is not None

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return what a port with TLS is opened with; None where there is none."""
        return self._certificates.credentials() if self._certificates is not None else None

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the same for a port that is not gRPC's."""
        return self._certificates.context() if self._certificates is not None else None

    def child_token(self, name: str, *roles: Role) -> str:
        """Return a token for a process that this collector starts. It is in no file, and ends with the collector."""
        token = new_token()
        with self._lock:
            self._children += (Entry(name, frozenset(roles), sha256=digest_of(token)),)
        return token

    # -- who calls -------------------------------------------------------------------------------------------------

    def caller(self, context: Any) -> Caller:
        """Return who calls; end the call with UNAUTHENTICATED and the remedy where nobody knows them."""
        peer = unquote(context.peer())
        if _is_tls(context):
            self._handshakes.called(peer)
        try:
            return self._known(context, peer)
        except _Unknown as unknown:
            self._audit.refused(unknown.why, _host(peer))
            context.abort(grpc.StatusCode.UNAUTHENTICATED, unknown.text)
            raise  # abort has raised

    def require(self, context: Any, role: Role, remedy: str) -> Caller:
        """Return who calls; end the call with PERMISSION_DENIED and the remedy where the role is not theirs."""
        caller = self.caller(context)
        if role not in caller.roles:
            if caller.entry is not None:
                remedy = f"{caller.name} has not the role {role}; add it to `roles` of that entry in the tokens file"
            self.refuse(caller, Why.ROLE)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, remedy)
        return caller

    def refuse(self, caller: Caller, why: Why) -> None:
        """Count a refusal of somebody who is known."""
        self._audit.refused(why, _host(caller.peer) if caller.entry is None else str(caller.name))

    def _known(self, context: Any, peer: str) -> Caller:
        token = _bearer(context)
        entry = None if token is None else of_token((*self._entries, *self._children), token)
        if entry is None and self.access.tokens is None:
            return self._anybody(context, peer)
        if entry is None and token is not None:
            raise _Unknown(Why.UNKNOWN_TOKEN, f"the token is none of this collector's; {_NEW_TOKEN}")
        names = _names(context)
        entry = entry or of_names(self._entries, names)
        if entry is None and names:
            text = f"no entry of the tokens file has `san` = {' or '.join(names)}; add one, or {_NEW_TOKEN}"
            raise _Unknown(Why.UNKNOWN_CERTIFICATE, text)
        if entry is None:
            raise _Unknown(Why.NO_TOKEN, f"no token came with the call; {_NEW_TOKEN}")
        if entry.is_over(self._unix_clock()):
            raise _Unknown(Why.EXPIRED, f"the entry {entry.name} of the tokens file has expired; {_NEW_TOKEN}")
        return Caller(entry.name, entry.tenant, entry.roles, peer, entry)

    def _anybody(self, context: Any, peer: str) -> Caller:
        """Return who calls a collector without tokens."""
        if self.access.tls is not None and not _is_tls(context):  # the port of its children has no TLS
            raise _Unknown(Why.NO_TOKEN, "this port is for what the collector started itself; use the other with TLS")
        is_local = peer.startswith(LOCAL_PEERS)
        name = next(iter(_names(context)), peer)  # a certificate of the authority, where there is one
        return Caller(name, "", frozenset(Role) if is_local else frozenset({Role.SHIP}), peer)

    # -- what lasts ------------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, caller: Caller, end: Callable[[], None]) -> Iterator[None]:
        """Call `end` once what let the caller in is taken out of the tokens file, is changed there, or expires."""
        key = object()
        with self._lock:
            self._streams[key] = caller, end
        try:
            if not self._stands(caller):  # it went while the call began
                end()
            yield
        finally:
            with self._lock:
                self._streams.pop(key, None)

    def _stands(self, caller: Caller) -> bool:
        entry = caller.entry
        if entry is None:
            return True
        return (entry in self._entries or entry in self._children) and not entry.is_over(self._unix_clock())

    def look(self, is_last: bool = False) -> None:
        """Read files that have changed, end what does not stand any more, tell. About once a second. Raises nothing."""
        now = self._clock()
        if not is_last and now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        self._look_at_tokens()
        if self._certificates is not None:
            if text := self._certificates.look():
                self._audit.note(text)
            num_failed = self._handshakes.failed(self._certificates.take_handshakes, now)
            if num_failed:
                self._audit.refused(Why.TLS_HANDSHAKE, UNTOLD, num_failed)
        self._end_those_revoked()
        self._audit.look(is_last)

    def _look_at_tokens(self) -> None:
        path = self.access.tokens
        found = stamp(path) if path is not None else None
        if path is None or (found == self._stamp and not self._said):
            return
        try:
            entries: Sequence[Entry] = read_tokens(path)
        except BadTokens as error:
            said, self._said = self._said, str(error)
            if said != self._said:
                self._audit.note(f"tokens not changed, the old ones hold: {error}")
            return
        self._stamp, self._said = found, ""
        if entries != self._entries:
            told = changes(self._entries, entries)
            self._entries = tuple(entries)
            self._audit.note(f"tokens file {path} changed: {told}")

    def _end_those_revoked(self) -> None:
        with self._lock:
            gone = [key for key, (caller, _) in self._streams.items() if not self._stands(caller)]
            over = [self._streams.pop(key) for key in gone]
        for caller, end in over:
            self.refuse(caller, Why.REVOKED)
            end()


def _bearer(context: Any) -> str | None:
    """Return the token of a call, or None where it has none. Another kind of authorisation is a token nobody has."""
    for key, value in context.invocation_metadata() or ():
        if key == HEADER:
            kind, _, token = str(value).partition(" ")
            return token.strip() if kind.lower() == "bearer" else ""
    return None


def _is_tls(context: Any) -> bool:
    return b"ssl" in context.auth_context().get("transport_security_type", ())


def _names(context: Any) -> list[str]:
    """Return the URIs and DNS names of the caller's certificate, which its authority has vouched for."""
    shown = context.auth_context()
    return [name.decode("ascii", "replace") for key in ("peer_uri", "peer_dns") for name in shown.get(key, ())]


def _host(peer: str) -> str:
    """Return an address without its port."""
    return peer.rpartition(":")[0].partition(":")[2] or peer
