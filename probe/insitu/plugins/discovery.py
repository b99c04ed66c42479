"""Plug-ins: what other packages add by entry point, found by their names; loaded when they are asked for.

How to write one: docs/extending.md. A scan of all installed packages is slow, so it waits for a name that is not ours:
a command, a scheme, a statistic, an architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from insitu.config import load
from insitu.destinations import scheme_of

COMMANDS: Final = "insitu.commands"
EXPORTERS: Final = "insitu.exporters"
SITES: Final = "insitu.sites"
STATISTICS: Final = "insitu.statistics"
VERDICTS: Final = "insitu.verdicts"
GROUPS: Final = (COMMANDS, EXPORTERS, SITES, STATISTICS, VERDICTS)
"""Every place at which something can be plugged in."""


class PluginError(ValueError):
    """A plug-in that was asked for by name and cannot be used; the message says why, in one line."""


class Broken(AssertionError):
    """A plug-in does not keep its contract: one sentence, with an example."""


class NotChecked(Exception):
    """Whether a plug-in keeps its contract cannot be said here, and why."""


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


def is_plugged_destination(to: str) -> bool:
    """Tell whether some package has an exporter for the scheme of a URL."""
    scheme = scheme_of(to)
    return bool(scheme) and any(plugin.name == scheme for plugin in installed(EXPORTERS))


def wanted(group: str, off: Sequence[str] | None = None) -> list[Plugin]:
    """Return those of a group that the setting `plugins_off` does not name. off: instead of what is set."""
    names = load().plugins_off if off is None else off
    return [plugin for plugin in installed(group) if plugin.name not in names]


def named(group: str, name: str) -> Plugin:
    """Return the plug-in of that name. Raises PluginError where there is none, or it is switched off."""
    found = {plugin.name: plugin for plugin in installed(group)}
    if name not in found:
        known = f"installed are {', '.join(found)}" if found else "none is installed"
        raise PluginError(f"no plug-in of {group} has the name {name!r}; {known} (insitu plugins list)")
    return switched_on(found[name])


def switched_on(plugin: Plugin) -> Plugin:
    """Return it. Raises PluginError where the setting `plugins_off` names it."""
    if plugin.name in load().plugins_off:
        raise PluginError(f"the plug-in {plugin} is switched off (plugins_off, INSITU_PLUGINS_OFF)")
    return plugin


def one_line(error: BaseException) -> str:
    """Return an error as it is told to people."""
    return " ".join(f"{type(error).__name__}: {error}".split())
