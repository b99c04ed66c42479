"""Plug-ins: what other packages add by entry point, found by their names; loaded when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

COMMANDS: Final = "insitu.commands"
VERDICTS: Final = "insitu.verdicts"
GROUPS: Final = (COMMANDS, VERDICTS)
"""Every place at which something can be plugged in."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One entry point of an installed package."""

    entry: EntryPoint

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def group(self) -> str:
        return self.entry.group

    @property
    def package(self) -> str:
        return self.entry.dist.name if self.entry.dist else "unknown"

    @property
    def version(self) -> str:
        return self.entry.dist.version if self.entry.dist else "unknown"

    def __str__(self) -> str:
        return f"{self.name} ({self.package} {self.version})"

    def load(self) -> Any:
        """Import what the entry point names. Raises whatever the import raises."""
        return self.entry.load()


def installed(group: str) -> list[Plugin]:
    """Return the plug-ins of a group, by name and then package; nothing of theirs is imported."""
    found = [Plugin(entry) for entry in entry_points(group=group)]
    return sorted(found, key=lambda plugin: (plugin.name, plugin.package))


def wanted(group: str, off: Sequence[str]) -> list[Plugin]:
    """Return those of a group that the setting `plugins_off` does not name."""
    return [plugin for plugin in installed(group) if plugin.name not in off]
