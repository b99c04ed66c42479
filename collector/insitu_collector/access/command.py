"""`insitu token`: callers of a collector, added to its tokens file and listed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

import click

from insitu.config_show import BadConfig, load_for_command
from insitu.segments.retention import parse_age
from insitu_collector.access.roles import Role
from insitu_collector.access.token_file import append_entry, read_tokens
from insitu_collector.access.tokens import NAME, SAN, TENANT, BadTokens, Entry, digest_of, in_utc, new_token

SCHEMA: Final = "insitu.tokens/1"


@click.group()
def token() -> None:
    """Say who may call a collector: entries of the file that `insitu collect --tokens FILE` reads.

    The file holds digests, never a token. To take somebody's leave to call away, take their entry out of it: a running
    collector reads it again.

    \b
    insitu token new rank-host-1 --role ship --tokens ./insitu-tokens.toml
    insitu token list --tokens ./insitu-tokens.toml
    """


_FILE: Final = click.option("--tokens", metavar="FILE", help="The tokens file.  [env: INSITU_TOKENS]")


@token.command()
@click.argument("name")
@click.option(
    "--role", "roles", multiple=True, required=True, type=click.Choice([str(role) for role in Role]), help="Repeatable."
)
@click.option(
    "--tenant", default="", metavar="TENANT", help="Whose the records are.  [default: nobody's in particular]"
)
@click.option("--expires", metavar="TIME", help="After how long it ends, like 90d or 12h.  [default: never]")
@click.option("--san", metavar="NAME", help="URI or DNS name in their certificate: no token is made.")
@_FILE
def new(
    name: str, roles: tuple[str, ...], tenant: str, expires: str | None, san: str | None, tokens: str | None
) -> None:
    """Make a token for a caller, print it, and append what stands for it to the file.

    It is printed this once and is nowhere else. Whoever calls keeps it in a file of their own (INSITU_TOKEN_FILE).

    \b
    insitu token new rank-host-2 --role ship --tenant team-a --tokens ./insitu-tokens.toml
    insitu token new ops --role admin --role read --expires 90d --tokens ./insitu-tokens.toml
    """
    made = None if san else new_token()
    try:
        entry = Entry(
            name=_matching(name, NAME, "NAME", "letters, digits and _.@-, at most 64"),
            roles=frozenset(map(Role, roles)),
            tenant=_matching(tenant, TENANT, "--tenant", "a-z, 0-9, _ and -, at most 64") if tenant else "",
            sha256=digest_of(made) if made else "",
            san=_matching(san, SAN, "--san", "a URI or a DNS name") if san else "",
            expires=in_utc(time.time() + _age(expires)) if expires else None,
        )
        path = _path(tokens)
        append_entry(path, entry)
    except BadTokens as error:
        raise BadConfig(str(error)) from None
    if made:
        click.echo(made)
    click.echo(f"{name} is in {path}; a running collector knows within seconds", err=True)


@token.command(name="list")
@click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA}).")
@_FILE
def list_(tokens: str | None, as_json: bool) -> None:
    """Print who may call, and what they may do.

    \b
    insitu token list --tokens ./insitu-tokens.toml
    insitu token list --tokens ./insitu-tokens.toml --json | python -m json.tool
    """
    path = _path(tokens)
    try:
        entries = read_tokens(path)
    except BadTokens as error:
        raise BadConfig(str(error)) from None
    rows = [_row(entry) for entry in entries]
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "tokens": str(path), "entries": rows}, indent=1))
        return
    for row in rows:
        until = ("expired " if row["expired"] else "until ") + row["expires"] if row["expires"] else "for ever"
        tenant, known_by = row["tenant"] or "no tenant", row["san"] or "token"
        click.echo(f"{row['name']:<24} {','.join(row['roles']):<16} {tenant:<16} {until:<34} {known_by}")


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "roles": [str(role) for role in Role if role in entry.roles],
        "tenant": entry.tenant or None,
        "expires": entry.expires.isoformat() if entry.expires else None,
        "expired": entry.is_over(time.time()),
        "san": entry.san or None,
    }


def _path(tokens: str | None) -> Path:
    found = load_for_command(tokens=tokens).tokens
    if found is None:
        raise BadConfig("which tokens file? give --tokens FILE, or set INSITU_TOKENS")
    return Path(found)


def _matching(value: str, form: Any, what: str, words: str) -> str:
    if not form.fullmatch(value):
        raise BadTokens(f"{what} is to be {words}")
    return value


def _age(text: str) -> float:
    try:
        age_s = parse_age(text)
    except ValueError as error:
        raise BadTokens(f"--expires: {error}") from None
    if age_s is None:
        raise BadTokens("--expires none is the default; leave it out")
    return age_s
