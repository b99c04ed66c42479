"""What the commands of `insitu store` have in common: their store, one line for what is wrong, text or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from insitu.cli import StorePath
from insitu.segments.layout import ShardLocked
from insitu_collector.keeping.catalog import CatalogBusy, refresh
from insitu_collector.opening import open_folder

STORE = click.argument("store", type=StorePath())
DRY_RUN = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")


def json_option(name: str) -> Callable[[Any], Any]:
    """Return the option `--json` of `insitu store <name>`."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document (insitu.store-{name}/1).")


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Give the store; whatever is wrong with it, or who else is at work on it, is one line."""
    folder = open_folder(path).path
    try:
        yield folder
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from None
    except ShardLocked as error:
        raise click.ClickException(f"another command changes {path} ({error.strerror}); wait for its end") from None


def say(name: str, store: Path, document: dict[str, Any], lines: Sequence[str], as_json: bool) -> None:
    """Print what was done, as one document or as lines."""
    if as_json:
        click.echo(json.dumps({"schema": f"insitu.store-{name}/1", "store": str(store), **document}, indent=1))
    else:
        click.echo("\n".join(lines))


def refresh_catalog(store: Path) -> None:
    """Bring the catalog up to date, unless another process does just that."""
    try:
        refresh(store)
    except CatalogBusy:
        click.echo("the catalog is written by another process just now: left to it", err=True)
