"""Who may call, from the options and settings of `insitu collect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from insitu.config import Config
from insitu.config_show import BadConfig
from insitu.wire.address import is_loopback
from insitu_collector.access.certificates import TlsFiles
from insitu_collector.access.gate import Access

Command = TypeVar("Command", bound=Callable[..., Any])


def access_options(command: Command) -> Command:
    """Add --tls-cert, --tls-key, --tls-client-ca, --tokens and --insecure to a command."""
    for option in (
        click.option("--insecure", is_flag=True, help="Listen for other hosts without TLS and tokens."),
        click.option("--tokens", metavar="FILE", help="Who may do what (`insitu token new` adds to it)."),
        click.option("--tls-client-ca", metavar="FILE", help="PEM of who signs callers' certificates: they need one."),
        click.option("--tls-key", metavar="FILE", help="PEM of the certificate's key."),
        click.option(
            "--tls-cert", metavar="FILE", help="PEM of the certificate: grpcs://. Read again when it changes."
        ),
    ):
        command = option(command)
    return command


def access_of(config: Config, host: str, *, insecure: bool) -> Access:
    """Return who may call. Raises BadConfig, one line, for half of a pair, and for a port that would be open to all."""
    access = Access(_tls_of(config), Path(config.tokens) if config.tokens else None)
    if is_loopback(host) or insecure:
        return access
    if access.tls is None or not (access.tokens or access.tls.client_ca):
        raise BadConfig(
            f"on {host} others can reach it: give --tls-cert, --tls-key and --tokens (or --tls-client-ca), or, where "
            "everybody who can may write and nobody listens, --insecure"
        )
    return access


def _tls_of(config: Config) -> TlsFiles | None:
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if not (cert or key or client_ca):
        return None
    if not (cert and key):
        missing = "--tls-key" if cert else "--tls-cert"
        raise BadConfig(f"TLS needs a certificate and its key: give {missing}, too")
    return TlsFiles(Path(cert), Path(key), Path(client_ca) if client_ca else None)


def open_to(access: Access, host: str, port: int, store: Path) -> str:
    """Return what to say of who may call, where that is a matter."""
    if is_loopback(host):
        return ""
    if access.tokens is None and (access.tls is None or access.tls.client_ca is None):
        return f"anyone who reaches {host}:{port} can write to {store} (--insecure)"
    if access.tls is None:
        return f"tokens go to {host}:{port} in the clear (--insecure)"
    return ""
