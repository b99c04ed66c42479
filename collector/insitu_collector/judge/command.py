"""`insitu judge STORE`: the one process that judges. It follows a store and appends what it finds to `verdicts`."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from insitu.cli import StorePath
from insitu.config import ConfigError, load
from insitu.config_show import BadConfig
from insitu.segments.layout import ShardLock, ShardLocked
from insitu_collector.judge.metrics import HOST, JudgeMetrics
from insitu_collector.judge.runs import Judge
from insitu_collector.notify.receivers import alert_options, deliveries_to, receivers_of
from insitu_collector.opening import open_folder
from insitu_collector.plugins import load_plugins
from insitu_collector.stopping import be_nice, stopping

LOCK: Final = "judge"
RETRY_S: Final = 1.0


def _run(judge: Judge, stop: threading.Event, parent: int | None, metrics: JudgeMetrics | None) -> None:
    while not stop.is_set():
        judge.look()
        if metrics is not None:
            metrics.publish(judge.snapshot())
        stop.wait(judge.pause_s())
        if parent is not None and os.getppid() != parent:
            stop.set()
    judge.look(final=True)


@click.command()
@click.argument("store", type=StorePath())
@click.option("--to", metavar="URL", help="Where verdicts go: grpc://HOST:PORT or file://STORE. [default: the store]")
@click.option("--once", is_flag=True, help="Judge what is there, write it, and end.")
@click.option("--with-parent", is_flag=True, hidden=True, help="End when the process that started this one ends.")
@click.option("--wait", is_flag=True, hidden=True, help="Where another judge is at work, begin when it has ended.")
@alert_options
@click.option("--metrics-port", metavar="N", type=click.IntRange(0, 65535), help="Serve /metrics. 0: any.")
def judge(
    store: Path,
    to: str | None,
    once: bool,
    with_parent: bool,
    wait: bool,
    webhooks: tuple[str, ...],
    otlp_logs: str | None,
    metrics_port: int | None,
) -> None:
    """Judge STORE each second while it is written, and append verdicts to it, until SIGTERM or Ctrl-C.

    When it stops, one line of JSON on stdout says how many records it made and where they went.

    \b
    insitu judge ./insitu-store
    insitu judge ./insitu-store --once
    insitu judge ./insitu-store --metrics-port 0 --webhook http://127.0.0.1:9/alerts
    """
    import insitu

    try:
        opened, config = open_folder(store), load(webhooks=webhooks or None, otlp_logs=otlp_logs)
        receivers, plugins = receivers_of(config), load_plugins()
    except ConfigError as error:
        raise BadConfig(str(error)) from None
    be_nice()
    with stopping() as stop, _alone(opened.path, to, stop, wait=wait) as may_begin:
        if not may_begin:
            return
        try:
            session = insitu.start(to=to or f"file://{store.absolute()}", role="client")
        except (OSError, ValueError) as error:
            raise click.ClickException(
                f"cannot write verdicts to {to or store}: {error}; check the path or --to"
            ) from None
        with session, _serving(metrics_port) as metrics:
            deliveries = deliveries_to(receivers, opened, session.event)
            with contextlib.closing(Judge(opened, session, plugins, deliveries)) as judge:
                if once:
                    judge.look(live=False, final=True)
                else:
                    click.echo(f"judging {store} until SIGTERM or Ctrl-C", err=True)
                    _run(judge, stop, os.getppid() if with_parent else None, metrics)
        click.echo(json.dumps({"schema": "insitu.judge/1", "sources": [session.stats().to_json()]}))


@contextlib.contextmanager
def _alone(store: Path, to: str | None, stop: threading.Event, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of the one judge of a store, unless verdicts go to another; False: asked to stop before it had it.

    Raises ClickException when another judge holds it, and not to `wait`.
    """
    if to is not None and to.startswith("file://") and Path(to.removeprefix("file://")).resolve() != store.resolve():
        yield True
        return
    lock = _try_lock(store)
    if isinstance(lock, ShardLocked):
        who = f"another judge (process {lock.holder}) already judges {store}"
        if not wait:
            raise click.ClickException(
                f"{who}; stop it, or have the verdicts of this one elsewhere with --to file://STORE"
            )
        click.echo(f"{who}: this one begins when that has ended", err=True)
    while isinstance(lock, ShardLocked) and not stop.wait(RETRY_S):
        lock = _try_lock(store)
    try:
        yield not isinstance(lock, ShardLocked)
    finally:
        if isinstance(lock, ShardLock):
            lock.release()


def _try_lock(store: Path) -> ShardLock | ShardLocked | None:
    """Return the lock, or who holds it; None where a store cannot be written: whoever must write to it will say so."""
    try:
        return ShardLock(store, LOCK)
    except ShardLocked as locked:
        return locked
    except OSError:
        return None


@contextlib.contextmanager
def _serving(port: int | None) -> Iterator[JudgeMetrics | None]:
    metrics = None if port is None else JudgeMetrics(port)
    if metrics is None:
        yield None
        return
    click.echo(f"metrics on http://{HOST}:{metrics.port}/metrics", err=True)
    with contextlib.closing(metrics):
        yield metrics
