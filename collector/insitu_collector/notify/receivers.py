"""Who is told of incidents, from settings: the options that `insitu judge` and `insitu collect` share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from insitu.config import Config, ConfigError, Origin
from insitu_collector.notify.alerts import sent_before
from insitu_collector.notify.delivery import Delivery, Receiver, Tell
from insitu_collector.notify.otlp_logs import OtlpLogs
from insitu_collector.notify.webhooks import Webhook

if TYPE_CHECKING:
    from insitu_collector.store import Store

_log = logging.getLogger("insitu")

Command = TypeVar("Command", bound=Callable[..., Any])


def alert_options(command: Command) -> Command:
    """Add --webhook and --otlp-logs to a command."""
    for option in (
        click.option("--otlp-logs", metavar="URL", help="OTLP endpoint that gets incidents as logs."),
        click.option("--webhook", "webhooks", metavar="URL", multiple=True, help="POST incidents there. Repeatable."),
    ):
        command = option(command)
    return command


def receivers_of(config: Config) -> list[Receiver]:
    """Return everyone who is told. Raises ConfigError, one line, for an address that cannot be used."""
    found: list[Receiver] = []
    try:
        found += [Webhook(url) for url in dict.fromkeys(config.webhooks)]
        found += _otlp_logs(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return found


def _otlp_logs(config: Config) -> list[Receiver]:
    try:
        return [OtlpLogs(config.otlp_logs)] if config.otlp_logs else []
    except ValueError as error:
        if config.origin("otlp_logs") is not Origin.ENVIRONMENT:
            raise
        # The variable belongs to all OpenTelemetry programs: it may be set for another one, and stops none of ours.
        _log.warning("insitu: incidents are not sent as OTLP logs: %s", error)
        return []


def deliveries_to(receivers: Sequence[Receiver], store: Store, tell: Tell) -> list[Delivery]:
    """Start the way to each receiver; what `store` says was sent there is not sent again."""
    rows = store.table("events").select(["kind", "text"]).to_pylist() if receivers else []
    return [Delivery(receiver, tell, sent_before(rows, receiver.target)) for receiver in receivers]
