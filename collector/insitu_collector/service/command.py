"""`insitu collect`: receive records, store them, and, if asked, keep a judge running."""

from __future__ import annotations

import errno
import json
import logging
import socket
import sys
from pathlib import Path

import click

from insitu.cli import StorePath
from insitu.config import Config, ConfigError
from insitu.config_show import BadConfig, load_for_command
from insitu.intake import Intake
from insitu.segments.shard import ShardLocked, StoreFull
from insitu_collector.access.certificates import BadCertificate
from insitu_collector.access.children import Child
from insitu_collector.access.gate import Access, Role
from insitu_collector.access.options import access_of, access_options, open_to
from insitu_collector.access.tokens import BadTokens
from insitu_collector.health.health import Health
from insitu_collector.health.pages import HOST as PAGES_HOST
from insitu_collector.health.pages import HealthPages
from insitu_collector.notify.receivers import alert_options, receivers_of
from insitu_collector.otlp.ports import OFF, http_listener
from insitu_collector.service.allocator import reuse_freed_blocks
from insitu_collector.service.companions import Companion, keep_running
from insitu_collector.service.listening import PortInUse
from insitu_collector.service.server import CollectorServer
from insitu_collector.stopping import stopping
from insitu_collector.subscriber.options import check_not_own, check_targets, subscriber_options, subscribers


def _port_or_off(context: click.Context, option: click.Parameter, said: str | None) -> str | None:
    """Return what was said, if it is a port or off. Raises BadParameter."""
    if said is None or said == OFF or (said.isdecimal() and int(said) < 1 << 16):
        return said
    raise click.BadParameter("it is a port, 0 for a free one, or off", context, option)


@click.command()
@click.option("--store", "store", required=True, type=StorePath(), help="Directory to store records in.")
@click.option("--port", default=4317, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--otlp-http-port",
    metavar="PORT",
    callback=_port_or_off,
    help="Where OTLP over HTTP is taken: a port, 0 for a free one, off.  [default: 4318 if free, off with --port 0]",
)
@click.option("--judge", is_flag=True, help="Also run `insitu judge` on the store.")
@click.option("--keep-bytes", metavar="SIZE", help="Most of what is received to keep, or none.  [default: 2GiB]")
@click.option("--keep-for", metavar="TIME", help="How long to keep it, or none.  [default: 24h]")
@click.option("--compact/--no-compact", default=True, show_default=True, help="Merge small files, with Parquet twins.")
@access_options
@click.option("--limits", metavar="TEXT", help="What to take at most, like streams=64,idle=30s.")
@click.option(
    "--quota",
    "quotas",
    metavar="TEXT",
    multiple=True,
    help="What a tenant may send, like a:bytes_per_s=8MiB. Repeatable.",
)
@click.option(
    "--metrics-port", metavar="N", type=click.IntRange(0, 65535), help="Serve /metrics, /healthz, /readyz. 0: any."
)
@subscriber_options
@alert_options
@click.option("--judge-metrics-port", metavar="N", type=click.IntRange(0, 65535), help="The judge's /metrics. 0: any.")
def collect(
    store: Path,
    port: int,
    host: str,
    otlp_http_port: str | None,
    judge: bool,
    keep_bytes: str | None,
    keep_for: str | None,
    compact: bool,
    limits: str | None,
    quotas: tuple[str, ...],
    metrics_port: int | None,
    webhooks: tuple[str, ...],
    otlp_logs: str | None,
    judge_metrics_port: int | None,
    otlp_to: tuple[str, ...],
    otlp_rate: str,
    insecure: bool,
    **access_files: str | None,
) -> None:
    """Receive records from probes, and OTLP from any OpenTelemetry SDK, and store them as Arrow files.

    When it stops, one line of JSON on stdout says what it and its judge wrote themselves.

    \b
    insitu collect --store ./insitu-store --port 0
    insitu collect --store ./insitu-store --port 0 --judge --keep-bytes 500MiB --keep-for 1h
    insitu collect --store ./insitu-store --port 0 --metrics-port 0 --limits streams=64 --quota bytes_per_s=64MiB
    insitu collect --store ./insitu-store --port 0 --judge --judge-metrics-port 0 --webhook http://127.0.0.1:9/alerts
    insitu collect --store ./insitu-store --port 0 --otlp-to http://127.0.0.1:4318
    """
    if (webhooks or otlp_logs or judge_metrics_port is not None) and not judge:
        raise click.UsageError("--webhook, --otlp-logs and --judge-metrics-port are the judge's; add --judge")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    stop = click.get_current_context().with_resource(stopping())
    reuse_freed_blocks()
    told = {"keep_bytes": keep_bytes, "keep_for": keep_for, "limits": limits, "quotas": quotas or None}
    config = load_for_command(**told, webhooks=webhooks or None, otlp_logs=otlp_logs, **access_files)
    access, health = access_of(config, host, insecure=insecure), Health(store, config.keep)
    if judge:
        _check_receivers(config)
    check_targets(otlp_to, otlp_rate)
    pages = None if metrics_port is None else HealthPages(metrics_port, health)
    otlp_http, why_not = _listen_for_otlp(otlp_http_port, host, port)
    check_not_own(otlp_to, host, [port, *([] if otlp_http is None else [otlp_http.getsockname()[1]])])
    server = _start(store, host, port, config, access, health, has_judge=judge, compact=compact, otlp_http=otlp_http)
    if pages is not None:  # nothing is said before all ports are had: who finds one in use reads that alone
        click.echo(f"health on http://{PAGES_HOST}:{pages.port}/readyz, /healthz and /metrics", err=True)
    for said in filter(None, (why_not, open_to(access, host, server.port, store))):
        click.echo(said, err=True)
    click.echo(f"keeps {config.keep}; --keep-bytes and --keep-for change it", err=True)
    if server.otlp is not None:
        click.echo(_otlp_taken(f"{host}:{server.port}", otlp_http, "http" if access.tls is None else "https"), err=True)
    click.echo(f"collecting on {server.address} into {store}", err=True)
    try:
        with server.child("judge", Role.SHIP) as judges, server.child("subscriber", Role.SHIP) as tellers:
            beside = [_judge(store, judges, config, judge_metrics_port)] if judge else []
            keep_running([*beside, *subscribers(store, otlp_to, otlp_rate, tellers)], stop)
    finally:
        server.stop()
        if pages is not None:
            pages.close()
    otlp = {} if server.otlp is None else server.otlp.to_json()
    click.echo(json.dumps({"schema": "insitu.collect/1", "sources": [server.ingest.account()], "otlp": otlp}))


def _listen_for_otlp(said: str | None, host: str, port: int) -> tuple[socket.socket | None, str]:
    """Return what `http_listener` does. Raises ClickException where a port was said and is taken."""
    try:
        return http_listener(said, host, port)
    except OSError as error:
        remedy = "choose another with --otlp-http-port (0: any; off: none)"
        raise click.ClickException(f"cannot listen on {error.filename}: {error.strerror}; {remedy}") from None


def _otlp_taken(over_grpc: str, http: socket.socket | None, scheme: str) -> str:
    told = f"takes OTLP of any OpenTelemetry SDK on {scheme}://{over_grpc} (gRPC)"
    if http is None:
        return told
    host, port = http.getsockname()[:2]
    return f"{told} and on {scheme}://{f'[{host}]' if ':' in host else host}:{port} (HTTP)"


def _check_receivers(config: Config) -> None:
    """Say now what a judge that is started again and again would say each time. Raises BadConfig, one line."""
    try:
        for receiver in receivers_of(config):
            receiver.close()
    except ConfigError as error:
        raise BadConfig(str(error)) from None


def _start(
    store: Path,
    host: str,
    port: int,
    config: Config,
    access: Access,
    health: Health,
    *,
    has_judge: bool,
    compact: bool,
    otlp_http: socket.socket | None,
) -> CollectorServer:
    """Return the running server. Raises ClickException: one line that names the thing and the remedy."""
    intake = Intake(config.limits, config.quotas)
    try:
        return CollectorServer(
            store,
            host,
            port,
            config.keep,
            access,
            intake,
            health,
            has_children=has_judge,
            compact=compact,
            otlp_http=otlp_http,
        )
    except (BadTokens, BadCertificate) as error:
        raise BadConfig(str(error)) from None
    except PortInUse as error:
        remedy = "choose another with --port (0: any)" if error.errno == errno.EADDRINUSE else "check --host and --port"
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}") from None
    except ShardLocked as error:
        raise click.ClickException(
            f"another collector (process {error.holder}) already writes {store}; stop it, or use another --store"
        ) from None
    except StoreFull:
        raise click.ClickException(
            f"store {store} is full: nothing can be recorded; make room on its disk, or use another --store"
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise click.ClickException(
            f"store {store} cannot be written: {reason}; give a directory you may write to with --store"
        ) from None


def _judge(store: Path, child: Child, config: Config, metrics_port: int | None) -> Companion:
    told = {"INSITU_WEBHOOKS": " ".join(config.webhooks), "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": config.otlp_logs or ""}
    metrics = [] if metrics_port is None else ["--metrics-port", str(metrics_port)]
    return Companion("the judge", ["judge", str(store), "--wait", "--to", child.address, *metrics], child, told)
