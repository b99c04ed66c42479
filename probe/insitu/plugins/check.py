"""`insitu plugins check`: does each plug-in keep its contract? Each group has a kit that tries it for real."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import click

from insitu.cli import ExitCode
from insitu.config_show import load_for_command
from insitu.plugins.discovery import (
    COMMANDS,
    EXPORTERS,
    GROUPS,
    SITES,
    STATISTICS,
    VERDICTS,
    Broken,
    NotChecked,
    Plugin,
    installed,
    one_line,
)

SCHEMA: Final = "insitu.plugins-check/1"
OK: Final = "ok"
BROKEN: Final = "broken"
NOT_CHECKED: Final = "not checked"
OFF: Final = "off"

KITS: Final = {
    COMMANDS: "insitu.plugins.check:check_command",
    EXPORTERS: "insitu.check_exporter:check",
    SITES: "insitu.plugins.check_sites:check",
    STATISTICS: "insitu.plugins.check_statistic:check",
    VERDICTS: "insitu_collector.check_verdict:check",
}
"""Group -> `check(plugin, to)`: returns what held; raises Broken, NotChecked, or what the plug-in raised."""


def check_command(plugin: Plugin, to: str | None) -> str:
    """Check a command. Raises Broken for what is none."""
    command = plugin.load()
    if not isinstance(command, click.Command):
        raise Broken(f"it is {command!r}, no click.Command")
    return "a click command"


def document(plugins: Sequence[Plugin], off: Sequence[str], to: str | None = None) -> dict[str, Any]:
    """Return what `--json` prints. to: where exporters are told to write, instead of a temporary folder."""
    return {"schema": SCHEMA, "plugins": [_row(plugin, plugin.name in off, to) for plugin in plugins]}


def _row(plugin: Plugin, is_off: bool, to: str | None) -> dict[str, Any]:
    state, text = (OFF, "plugins_off names it") if is_off else _checked(plugin, to)
    return {
        "name": plugin.name,
        "group": plugin.group,
        "package": plugin.package,
        "version": plugin.version,
        "state": state,
        "text": text,
    }


def _checked(plugin: Plugin, to: str | None) -> tuple[str, str]:
    try:
        return OK, _kit(plugin.group)(plugin, to)
    except Broken as error:
        return BROKEN, " ".join(str(error).split())
    except NotChecked as error:
        return NOT_CHECKED, " ".join(str(error).split())
    except Exception as error:  # another author's code
        return BROKEN, one_line(error)


def _kit(group: str) -> Callable[[Plugin, str | None], str]:
    module, _, name = KITS[group].partition(":")
    try:
        kit: Callable[[Plugin, str | None], str] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise NotChecked(f"the check needs the package {error.name}, which is not installed") from None
    return kit


@click.command()
@click.argument("name", required=False)
@click.option("--to", metavar="URL", help="Where an exporter is told to write, instead of a temporary folder.")
@click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA}).")
@click.pass_context
def check(ctx: click.Context, name: str | None, to: str | None, as_json: bool) -> None:
    """Try each plug-in, or those called NAME, against what its group promises, and say a line of each.

    A statistic must add up to that of the whole, an exporter acknowledge, retry or refuse, sites lie where they are
    said to in the plug-in's example, and a verdict be the same each time it is asked.

    Exit status 3 when one breaks its contract, 5 when one could not be checked.

    \b
    insitu plugins check
    insitu plugins check --json | python -m json.tool
    """
    plugins = [plugin for group in GROUPS for plugin in installed(group)]
    chosen = [plugin for plugin in plugins if name in (None, plugin.name)]
    if name is not None and not chosen:
        there = ", ".join(dict.fromkeys(plugin.name for plugin in plugins)) or "none"
        raise click.UsageError(f"no plug-in is called {name!r}; installed: {there}", ctx)
    found = document(chosen, load_for_command().plugins_off, to)
    click.echo(json.dumps(found, indent=1) if as_json else _text(found["plugins"]))
    states = {row["state"] for row in found["plugins"]}
    if BROKEN in states:
        ctx.exit(ExitCode.PROBLEMS_FOUND)
    if NOT_CHECKED in states:
        ctx.exit(ExitCode.PARTIAL)


def _text(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return f"no plug-in is installed; the groups are {', '.join(GROUPS)} (docs/extending.md)"
    return "\n".join(f"{row['name']:<20} {row['group']:<18} {row['state']}: {row['text']}" for row in rows)
