"""`insitu store dead ls | show | drop`: requests that no receiver would take."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Final

import click

from insitu_collector.keeping.words import STORE, json_option, opened, say
from insitu_collector.subscriber.words import counts_text

LETTER: Final = "insitu.store-dead-letter/1"

_OF = click.option("--of", metavar="URL", help="Those of this destination alone.")


@click.group()
def dead() -> None:
    """Look at dead letters: requests that a receiver of OTLP would not take, kept as they were.

    \b
    insitu store dead ls ./insitu-store
    insitu store dead show ./insitu-store
    """


@dead.command()
@STORE
@_OF
@json_option("dead")
def ls(store: Path, of: str | None, as_json: bool) -> None:
    """List the dead letters of STORE, oldest first of each destination, and those that are damaged.

    \b
    insitu store dead ls ./insitu-store
    insitu store dead ls ./insitu-store --json
    """
    from insitu_collector.subscriber.dead import listed
    from insitu_collector.subscriber.letter import Damaged, Letter

    def line(letter: Letter | Damaged) -> str:
        if isinstance(letter, Damaged):
            return f"{letter.name}  damaged ({letter.num_bytes} B): {letter.text}"
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(letter.unix_ns / 1e9))
        what = f"{counts_text({letter.signal: letter.num_items})} ({letter.num_bytes} B)"
        return f"{letter.name}  {at}  {what} for {letter.to}: {letter.reason} {letter.text}".rstrip()

    with opened(store) as path:
        found = [letter for _, letter in listed(path, of)]
    lines = [line(letter) for letter in found] or [f"{store} has no dead letters"]
    document = {
        "letters": [letter.to_json() for letter in found if isinstance(letter, Letter)],
        "damaged": [letter.to_json() for letter in found if isinstance(letter, Damaged)],
    }
    say("dead", store, document, lines, as_json)


@dead.command()
@STORE
@click.argument("letter", required=False)
@click.option("--raw", is_flag=True, help="The bytes of the request, as they are.")
def show(store: Path, letter: str | None, raw: bool) -> None:
    """Print one dead LETTER of STORE as JSON: why it is one, and its request. Without a name, the oldest that is whole.

    \b
    insitu store dead show ./insitu-store
    insitu store dead show ./insitu-store --raw
    """
    from google.protobuf.json_format import MessageToDict

    from insitu_collector.subscriber.dead import listed, read
    from insitu_collector.subscriber.letter import BadLetter, Damaged
    from insitu_collector.subscriber.payloads import REQUESTS

    with opened(store) as path:
        those = [(each, found) for each, found in listed(path) if letter in (None, found.name)]
    if not those:
        if letter is not None:
            raise click.ClickException(
                f"{store} has no dead letter {letter}; `insitu store dead ls {store}` lists them"
            )
        click.echo(f"{store} has no dead letters")
        return
    file, first = min(those, key=lambda each: isinstance(each[1], Damaged))
    try:
        found, payload = read(path, file)
    except BadLetter as error:
        remedy = f"`insitu store dead drop {store} {first.name}` removes it"
        raise click.ClickException(f"{first.name} is damaged: {error.text}; {remedy}") from None
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from None
    if raw:
        click.echo(payload.body, nl=False)
        return
    request = MessageToDict(REQUESTS[payload.signal].FromString(payload.body))
    click.echo(json.dumps({"schema": LETTER, **found.to_json(), "request": request}, indent=2))


@dead.command()
@STORE
@click.argument("names", nargs=-1, metavar="[LETTER]...")
@click.option("--all", "all_of_them", is_flag=True, help="All of them.")
@_OF
def drop(store: Path, names: tuple[str, ...], all_of_them: bool, of: str | None) -> None:
    """Remove dead LETTERs of STORE for good, damaged or not.

    \b
    insitu store dead drop ./insitu-store --all
    insitu store dead drop ./insitu-store --all --of http://127.0.0.1:4318
    """
    from insitu_collector.subscriber.dead import listed, remove

    if bool(names) == all_of_them:
        raise click.UsageError("name letters, or give --all")
    with opened(store) as path:
        found = {letter.name: each for each, letter in listed(path, of)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise click.ClickException(f"{store} has no dead letter {unknown[0]}; nothing was removed")
    for name in found if all_of_them else names:
        remove(found[name])
    click.echo(f"{len(found) if all_of_them else len(names)} dead letters were removed")
