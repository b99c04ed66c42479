"""What `insitu collect` takes of subscribers: options, their check, the processes they become. Loads nothing heavy."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import click

from insitu.segments.retention import parse_bytes
from insitu_collector.access.children import Child
from insitu_collector.service.companions import Companion

DEFAULT_RATE: Final = "16MiB"

Command = TypeVar("Command", bound=Callable[..., Any])


def subscriber_options(command: Command) -> Command:
    """Add --otlp-to and --otlp-rate to a command."""
    for option in (
        click.option(
            "--otlp-rate", metavar="SIZE", default=DEFAULT_RATE, show_default=True, help="Most of it a second, or none."
        ),
        click.option("--otlp-to", metavar="URL", multiple=True, help="Send what is stored on as OTLP. Repeatable."),
    ):
        command = option(command)
    return command


def rate_of(text: str, option: str) -> int | None:
    """Return bytes a second. Raises UsageError, one line."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from None


def check_targets(urls: Sequence[str], rate: str) -> None:
    """Say now what a subscriber that is started again and again would say each time. Raises UsageError, one line."""
    rate_of(rate, "--otlp-rate")
    for url in urls:
        check_target(url, "--otlp-to")


def check_target(url: str, option: str) -> None:
    """Raise UsageError, one line, for a URL that cannot be used, and ClickException without the extra `otlp`."""
    try:
        from insitu_collector.subscriber.ends import open_end
        from insitu_collector.subscriber.target import parse_target
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(("opentelemetry", "requests", "google")):
            raise
        raise click.ClickException(f"{option} needs the extra otlp: pip install 'insitu[otlp]'") from None
    try:
        open_end(parse_target(url, os.environ)).close()
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{option}: {error}") from None


def check_not_own(urls: Sequence[str], host: str, ports: Sequence[int]) -> None:
    """Raise UsageError, one line, for a URL of a collector that listens on these ports of `host`.

    It would take what it sends for news, and send it again, for ever.
    """
    for url in urls:
        from insitu_collector.subscriber.target import parse_target

        target = parse_target(url, os.environ)
        place = urlsplit(f"//{target.place}")
        port = place.port or (443 if target.is_encrypted else 80)
        if port in ports and _reaches(place.hostname or "", host):
            remedy = "name another receiver, or move this one with --port and --otlp-http-port"
            raise click.UsageError(f"--otlp-to {url} is this collector itself; {remedy}")


def _reaches(name: str, host: str) -> bool:
    """Return whether who asks for `name` may reach what listens on `host`. One that nobody knows is another's."""
    try:
        asked, ours = _addresses(name), _addresses(host)
    except OSError:
        return False
    if any(address.is_unspecified for address in ours):
        return any(_is_of_this_machine(address) for address in asked)
    return bool(asked & ours) or any(address.is_unspecified for address in asked)


def _addresses(host: str) -> set[IPv4Address | IPv6Address]:
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    return {ip_address(str(address[0]).partition("%")[0]) for *_, address in found}


def _is_of_this_machine(address: IPv4Address | IPv6Address) -> bool:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def subscribers(store: Path, urls: Sequence[str], rate: str, child: Child) -> list[Companion]:
    """Return the process of each receiver: one that is slow or away holds up no other. child: how they tell events."""
    return [
        Companion(
            f"the subscriber of {url}",
            ["subscribe", str(store), "--to", url, "--rate", rate, "--tell", child.address],
            child,
        )
        for url in dict.fromkeys(urls)
    ]
