"""Opening a store for a command: whatever goes wrong is one line, and the exit status that says what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from insitu.config import ConfigError
from insitu.config_show import BadConfig
from insitu.credentials import CredentialError
from insitu.rules.command import Unreachable
from insitu.wire.address import SCHEMES
from insitu_collector.store import Store, open_store


@contextmanager
def opened(store: Path) -> Iterator[Store]:
    """Give a store: a folder, or `grpc://host:port` or `grpcs://host:port` of a collector.

    Raises ClickException where it is not there, or what is read of it meanwhile may not be read; Unreachable where its
    collector does not answer.
    """
    try:
        found = open_store(store)
    except (ConfigError, CredentialError) as error:
        raise BadConfig(str(error)) from None
    except (FileNotFoundError, ValueError) as error:  # an address that cannot be used, too
        raise click.ClickException(str(error)) from None
    try:
        yield found
    except (ConnectionError, TimeoutError) as error:
        raise Unreachable(str(error)) from None
    except (FileNotFoundError, PermissionError) as error:
        raise click.ClickException(str(error)) from None
    finally:
        found.close()


def open_folder(store: Path) -> Store:
    """Return the store in a folder. Raises ClickException where there is none, or a collector is named instead."""
    if str(store).partition(":")[0] in SCHEMES:
        raise click.ClickException("this needs the store's folder; run it on the collector's host")
    try:
        return open_store(store)
    except (FileNotFoundError, ValueError) as error:
        raise click.ClickException(str(error)) from None
