"""The tokens file: who may do what. It holds digests of tokens, never a token. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from insitu_collector.access.roles import Role

PREFIX: Final = "insitu_"
"""Scanners for leaked secrets know a token by it."""
NAME: Final = re.compile(rf"(?!{PREFIX})[A-Za-z0-9][A-Za-z0-9_.@-]{{0,63}}")
"""Names are told and logged: what looks like a token is none."""
TENANT: Final = re.compile(r"[a-z0-9_-]{1,64}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
SAN: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,512}")
"""Printable, and as it stands between quotation marks."""
_KEYS: Final = ("name", "sha256", "san", "tenant", "roles", "expires")


class BadTokens(ValueError):
    """A tokens file that cannot be used: one line that names the entry and what it may be, never what it holds."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One caller, known by a token or by a name in its certificate."""

    name: str
    roles: frozenset[Role]
    tenant: str = ""
    """Whose its records are; empty: nobody's in particular."""
    sha256: str = ""
    san: str = ""
    """A URI or DNS name of a certificate's subjectAltName, where there is no token."""
    expires: datetime | None = None

    def is_over(self, unix_s: float) -> bool:
        """Return whether it means nothing any more."""
        return self.expires is not None and unix_s >= self.expires.timestamp()

    def toml(self) -> str:
        """Return it as the file has it."""
        roles = ", ".join(f'"{role}"' for role in Role if role in self.roles)
        lines = ["[[token]]", f'name = "{self.name}"']
        lines += [f'sha256 = "{self.sha256}"'] if self.sha256 else [f'san = "{self.san}"']
        lines += [f'tenant = "{self.tenant}"'] if self.tenant else []
        lines += [f"roles = [{roles}]"]
        lines += [f"expires = {self.expires.isoformat()}"] if self.expires else []
        return "\n".join(lines) + "\n"


def new_token() -> str:
    """Return a token of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """Return what stands for a token in the file. A random token needs neither salt nor a slow hash."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def parse_tokens(text: str) -> tuple[Entry, ...]:
    """Return the entries of a file. Raises BadTokens."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        where = re.search(r"line \d+", str(error))  # the message may quote the text
        raise BadTokens(f"no TOML{f', {where[0]}' if where else ''}; write [[token]] entries") from None
    found = table.pop("token", [])
    if table:
        raise BadTokens(f"no key {_shown(next(iter(table)))}; write [[token]] entries")
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise BadTokens("`token` is no list of entries; write [[token]]")
    entries = tuple(_entry(each, number) for number, each in enumerate(found, 1))
    for key in ("name", "sha256", "san"):
        _check_unique(entries, key)
    return entries


def _entry(table: Mapping[str, Any], number: int) -> Entry:
    name = table.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadTokens(f"entry {number}: `name` is to be letters, digits and _.@-, at most 64")
    for key in table:
        if key not in _KEYS:
            raise BadTokens(f"entry {name}: no key {_shown(key)}; the keys are {', '.join(_KEYS)}")
    if ("sha256" in table) == ("san" in table):
        raise BadTokens(f"entry {name}: give `sha256` of its token, or `san` of its certificate")
    return Entry(
        name=name,
        roles=_roles(table.get("roles"), name),
        tenant=_matching(table, "tenant", TENANT, "a-z, 0-9, _ and -, at most 64", name),
        sha256=_matching(table, "sha256", _DIGEST, "64 hex digits in lower case", name),
        san=_matching(table, "san", SAN, "a URI or a DNS name", name),
        expires=_expires(table.get("expires"), name),
    )


def _matching(table: Mapping[str, Any], key: str, form: re.Pattern[str], words: str, name: str) -> str:
    value = table.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or not form.fullmatch(value):
        raise BadTokens(f"entry {name}: `{key}` is to be {words}")
    return value


def _roles(value: Any, name: str) -> frozenset[Role]:
    if not isinstance(value, list) or not value or not all(each in tuple(map(str, Role)) for each in value):
        raise BadTokens(f"entry {name}: `roles` is to be a list of {', '.join(Role)}")
    return frozenset(map(Role, value))


def _expires(value: Any, name: str) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise BadTokens(f"entry {name}: `expires` is to be a time with its zone, like 2027-01-31T00:00:00Z")
    return value


def _check_unique(entries: Iterable[Entry], key: str) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        value = getattr(entry, key)
        if value and value in seen:
            raise BadTokens(f"entries {seen[value]} and {entry.name} have one {key}; each needs its own")
        seen[value] = entry.name


def _shown(key: str) -> str:
    """Return a key as it may be told: one that somebody put a secret into is not."""
    return repr(key) if re.fullmatch(r"[a-z0-9_]{1,16}", key) else "of that kind"


def of_token(entries: Sequence[Entry], token: str) -> Entry | None:
    """Return whose token it is. Takes as long whichever it is, and whether it is any."""
    presented, found = digest_of(token), None
    for entry in entries:
        if hmac.compare_digest(entry.sha256.encode(), presented.encode()):
            found = entry
    return found


def of_names(entries: Sequence[Entry], names: Iterable[str]) -> Entry | None:
    """Return who has a certificate with one of these names; the first of the file, where it has several."""
    shown = set(names)
    return next((entry for entry in entries if entry.san and entry.san in shown), None)


def changes(before: Sequence[Entry], after: Sequence[Entry]) -> str:
    """Return what a new version of a file changes, in names alone."""
    old, new = ({entry.name: entry for entry in entries} for entries in (before, after))
    parts = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed": [name for name in new if name in old and new[name] != old[name]],
    }
    return "; ".join(f"{word} {', '.join(names)}" for word, names in parts.items() if names) or "nothing changed"


def in_utc(unix_s: float) -> datetime:
    """Return a Unix time as the file has it, in whole seconds."""
    return datetime.fromtimestamp(int(unix_s), UTC)
