"""Exporters of other packages: the entry-point group `insitu.exporters`, by the scheme of a destination.

The entry point's name is the scheme, and what it names is any callable `(to, source)` that returns an object with
`export`. How to write one: docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from insitu.exporters.base import Ack, Batch, Level
from insitu.plugins.discovery import EXPORTERS, PluginError, installed, one_line, switched_on
from insitu.vocabulary import DropReason

if TYPE_CHECKING:
    from insitu.identity import Source


class Ships(Protocol):
    """What a plug-in gives: `export` at least, as of `insitu.exporters.Exporter`; its other methods if it likes."""

    def export(self, batch: Batch) -> Ack:
        """Take one batch; return how far it got. Raises `Retry` or `Refused`, nothing else, and does not wait."""
        ...


class PluggedExporter:
    """A whole exporter of one that may be less: what it leaves out does nothing.

    Without a `durable` of its own a batch is durable when `export` said so: everything up to it is then.
    """

    def __init__(self, plugged: Ships) -> None:
        self._export = plugged.export
        self._durable_to: dict[int, int] = {}
        self._given: dict[str, Callable[..., Any] | None] = {
            name: getattr(plugged, name, None) for name in ("durable", "refused", "flush", "close")
        }

    def export(self, batch: Batch) -> Ack:
        """Take one batch. Raises `Retry`, `Refused`, and TypeError for what is no `Ack`."""
        ack = self._export(batch)
        if not isinstance(ack, Ack):
            raise TypeError(f"export returned {ack!r}, which is no insitu.exporters.Ack")
        if ack.level is Level.DURABLE:
            self._durable_to[ack.stream] = max(ack.seq, self._durable_to.get(ack.stream, -1))
        return ack

    def durable(self, stream: int) -> int:
        """Return the highest seq up to which everything is durable, or -1."""
        given = self._given["durable"]
        return self._durable_to.get(stream, -1) if given is None else int(given(stream))

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, what was refused after `export` had returned."""
        given = self._given["refused"]
        return [] if given is None else list(given())

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything exported is durable; where the plug-in has no flush, there is nothing to wait for."""
        given = self._given["flush"]
        return True if given is None else bool(given(timeout_s))

    def close(self, timeout_s: float) -> None:
        """Flush within the deadline and let go of every resource."""
        given = self._given["close"]
        if given is not None:
            given(timeout_s)


def open_plugged(to: str, scheme: str, source: Source, ours: str) -> PluggedExporter:
    """Return the exporter that another package has for a scheme.

    ours: the schemes that need none, for people. Raises PluginError, a ValueError, where nobody has it or it cannot be
    loaded, and OSError where it says that the destination cannot be written.
    """
    found = {plugin.name: plugin for plugin in installed(EXPORTERS)}
    if scheme not in found:
        theirs = "".join(f", {name}://" for name in found)
        raise PluginError(f"destination {to!r} has no known scheme; use one of {ours}{theirs}")
    plugin = switched_on(found[scheme])
    try:
        return PluggedExporter(plugin.load()(to, source))
    except (OSError, ValueError):
        raise
    except Exception as error:  # another author's code
        raise PluginError(f"the exporter {plugin} cannot be opened: {one_line(error)}") from error
