"""Exporters by destination: `grpc://host:port`, `file://STORE`, `memory://`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from insitu.exporters.base import Ack, Batch, Exporter, Level, Refused, Retry

if TYPE_CHECKING:
    from insitu.identity import Source
    from insitu.retention import Keep
    from insitu.segment_expiry import Tell

__all__ = ["Ack", "Batch", "Exporter", "Level", "Refused", "Retry", "open_exporter"]

SCHEMES = ("grpc", "file", "memory")


def open_exporter(to: str, source: Source, keep: Keep | None = None, tell: Tell | None = None) -> Exporter:
    """Return the exporter for a destination URL.

    keep: what a store of this process's own keeps. tell: takes rows of `gaps` about what has gone from it.
    Raises ValueError for an unknown scheme, and OSError when a store cannot be written.
    """
    url = urlsplit(to)
    if url.scheme == "grpc":
        from insitu.exporters.collector import CollectorExporter

        return CollectorExporter(url.netloc, source)
    if url.scheme == "file":
        from insitu.exporters.file import FileExporter

        return FileExporter(url.netloc + url.path, source, keep=keep, tell=tell)
    if url.scheme == "memory":
        from insitu.exporters.memory import MemoryExporter

        return MemoryExporter.named(url.netloc + url.path)
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    raise ValueError(f"destination {to!r} has no known scheme; use one of {known}")
