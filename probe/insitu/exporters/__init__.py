"""Exporters by destination: `grpc://` (`grpcs://`), `file://`, `otlp://`, `memory://`, and those of other packages."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from insitu.credentials import NONE, Credentials
from insitu.exporters.base import Ack, Batch, Exporter, Level, Refused, Retry

if TYPE_CHECKING:
    from insitu.identity import Source
    from insitu.rules.changes import RuleChanges
    from insitu.segments.retention import Keep
    from insitu.session.step_traces import StepTraces
    from insitu.wire.insitu_pb2 import Dump

__all__ = ["Ack", "Batch", "Exporter", "Level", "Refused", "Retry", "open_exporter"]

SCHEMES = ("grpc", "grpcs", "file", "otlp", "memory")

Put = Callable[[str, Sequence[dict[str, Any]]], None]
"""Takes rows of a table into the session's own stream."""
Changes = Callable[[], "RuleChanges | None"]
"""Gives the rules of the session's model, once it has one."""


def open_exporter(
    to: str,
    source: Source,
    keep: Keep | None = None,
    put: Put | None = None,
    traces: StepTraces | None = None,
    asked: Callable[[Dump], None] | None = None,
    changes: Changes | None = None,
    spool: str | None = None,
    credentials: Credentials = NONE,
    folder: str = "",
) -> Exporter:
    """Return the exporter for a destination, the URL `to`, of rows that `source` writes.

    keep: what a store of this process's own keeps. put: takes rows that the exporter itself has to say:
    `gaps` about what has gone from such a store, `clocks` about a collector on another host. traces: of the session's
    steps, for spans that link to them. asked: takes what a collector asks the flight recorder for. changes: the rules
    that a collector may change. spool: folder of a store for what a collector that is away cannot take.
    credentials: what a collector is shown. folder: where a path like `./store` begins; "": where this process is.
    Raises ValueError for a scheme nobody knows or a missing extra, and OSError when a store or spool cannot be written.
    """
    url = urlsplit(to)
    if url.scheme in ("grpc", "grpcs"):
        from insitu.exporters.collector import CollectorExporter

        tell = partial(put, "clocks") if put else None
        collector = CollectorExporter(
            f"{url.scheme}://{url.netloc}", source, tell=tell, asked=asked, changes=changes, credentials=credentials
        )
        if spool is None:
            return collector
        from insitu.exporters.spool import SpoolingExporter

        gaps, spool = partial(put, "gaps") if put else None, os.path.join(folder, spool)
        with _naming("spool", spool):
            return SpoolingExporter(collector, to, spool, source, keep=keep, tell=gaps)
    if url.scheme == "file":
        from insitu.exporters.file import FileExporter

        path = url.netloc + url.path
        if not path or "\0" in path:
            raise ValueError(f"destination {to!a:.200} names no folder; write one like file://./insitu-store")
        path = os.path.join(folder, path)
        with _naming(f"destination {to:.200}:", path):
            return FileExporter(path, source, keep=keep, tell=partial(put, "gaps") if put else None)
    if url.scheme == "otlp":
        try:
            from insitu.exporters.otlp.exporter import OtlpExporter
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("opentelemetry"):
                raise
            raise ValueError(f"destination {to!r} needs the extra otlp: pip install 'insitu[otlp]'") from None
        return OtlpExporter(url.netloc + url.path, source, traces=traces)
    if url.scheme == "memory":
        from insitu.exporters.memory import MemoryExporter

        return MemoryExporter.named(url.netloc + url.path)
    from insitu.exporters.plugged import open_plugged

    return open_plugged(to, url.scheme, source, ", ".join(f"{scheme}://" for scheme in SCHEMES))


@contextmanager
def _naming(what: str, folder: str) -> Iterator[None]:
    """Say in one line, of what fails since a folder cannot be written, which it is and what to do."""
    from insitu.segments.layout import ShardLocked, StoreFull

    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"{what} {folder} is a file; name a folder, which is made where there is none")
    try:
        yield
    except (StoreFull, ShardLocked):
        raise
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise type(error)(
            f"{what} {folder:.200} cannot be written: {why}; name a folder that you may write to"
        ) from None
