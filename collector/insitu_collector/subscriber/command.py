"""`insitu subscribe`: what a store holds, to a receiver of OTLP, live."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from insitu.cli import ExitCode, StorePath
from insitu_collector.opening import open_folder
from insitu_collector.stopping import be_nice, stopping
from insitu_collector.subscriber.options import DEFAULT_RATE, check_target, rate_of

if TYPE_CHECKING:
    from insitu_collector.subscriber.subscriber import Subscriber

LOOK_S: Final = 1.0
"""Between looks at a store that had nothing new."""
ONCE_S: Final = 30.0
"""How long a receiver may take nothing before `--once` gives up."""

_log = logging.getLogger("insitu")


@click.command()
@click.argument("store", type=StorePath())
@click.option(
    "--to", required=True, metavar="URL", help="The receiver: http://HOST:4318, grpc://HOST:4317, https, grpcs."
)
@click.option(
    "--rate", metavar="SIZE", default=DEFAULT_RATE, show_default=True, help="Most that leaves a second, or none."
)
@click.option("--once", is_flag=True, help="Send what is there, and end.")
@click.option("--tell", metavar="URL", hidden=True, help="Where events go. [default: the store]")
@click.pass_context
def subscribe(ctx: click.Context, store: Path, to: str, rate: str, once: bool, tell: str | None) -> None:
    """Send what STORE holds, and what comes, to a receiver of OTLP, until SIGTERM or Ctrl-C.

    Intervals and requests leave as spans, numbers as metrics, verdicts, incidents and events as logs. It may be stopped
    or killed at any time, and goes on where it was. `insitu collect --otlp-to URL` runs it beside a collector.

    \b
    insitu subscribe ./insitu-store --to http://127.0.0.1:4318
    insitu subscribe ./insitu-store --to grpc://127.0.0.1:4317 --rate 1MiB

    Exit codes of --once: 0 all was taken or is told, 4 the receiver takes nothing.
    """
    from insitu_collector.subscriber.delivery import GaveUp
    from insitu_collector.subscriber.opened import opened
    from insitu_collector.subscriber.subscriber import Busy

    check_target(to, "--to")
    bytes_per_s = rate_of(rate, "--rate")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    open_folder(store)
    be_nice()
    with stopping() as stop:
        give_up_s = ONCE_S if once else None
        try:
            with opened(
                store, to, bytes_per_s, stop.wait, teller(tell or f"file://{store.absolute()}"), give_up_s
            ) as subscriber:
                click.echo(f"sending {store} to {to} until SIGTERM or Ctrl-C", err=True)
                _run(subscriber, stop, once)
        except Busy as error:
            raise click.ClickException(f"{error}; stop it, or use another --to") from None
        except GaveUp as error:
            click.echo(f"insitu subscribe: {to} takes nothing ({error}); what it has taken is remembered", err=True)
            ctx.exit(ExitCode.UNREACHABLE)


def _run(subscriber: Subscriber, stop: threading.Event, once: bool) -> None:
    try:
        is_whole = subscriber.look(final=once)
        while is_whole and not once and not stop.wait(LOOK_S):
            is_whole = subscriber.look()
        if is_whole:
            subscriber.finish()
    finally:
        subscriber.save()


def teller(to: str) -> Callable[[str, str], None]:
    """Return what writes a row of `events`, in a session of its own: there are few."""

    def tell(kind: str, text: str) -> None:
        import insitu

        try:
            with closing(insitu.start(to=to, role="client")) as session:
                session.event(kind, text)
        except (OSError, ValueError) as error:
            _log.warning("insitu: an event could not be told to %s (%s): %s", to, error, text)

    return tell
