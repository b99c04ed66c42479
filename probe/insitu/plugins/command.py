"""`insitu plugins`: what is plugged in, and whether it loads; `check` is in a module of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import click

from insitu.cli import ExitCode
from insitu.config_show import load_for_command
from insitu.plugins.check import check
from insitu.plugins.discovery import GROUPS, Plugin, installed, one_line

SCHEMA: Final = "insitu.plugins/1"


def document(off: Sequence[str]) -> dict[str, Any]:
    """Return what `--json` prints. Each plug-in that is on is imported, to see whether it can be."""
    return {
        "schema": SCHEMA,
        "groups": list(GROUPS),
        "plugins": [_row(plugin, plugin.name not in off) for group in GROUPS for plugin in installed(group)],
    }


def _row(plugin: Plugin, is_on: bool) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "group": plugin.group,
        "package": plugin.package,
        "version": plugin.version,
        "on": is_on,
        "error": _error(plugin) if is_on else None,
    }


def _error(plugin: Plugin) -> str | None:
    try:
        plugin.load()
    except Exception as error:
        return one_line(error)
    return None


@click.group()
def plugins() -> None:
    """Say what other packages add to insitu; INSITU_PLUGINS_OFF or plugins_off in insitu.toml leave some out.

    \b
    insitu plugins list
    insitu plugins check
    """


plugins.add_command(check)


@plugins.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document (insitu.plugins/1).")
@click.pass_context
def list_(ctx: click.Context, as_json: bool) -> None:
    """List every plug-in: its name, group, package and version, and whether it is on and loads.

    Exit status 3 when one that is on cannot be loaded.

    \b
    insitu plugins list
    insitu plugins list --json | python -m json.tool
    """
    found = document(load_for_command().plugins_off)
    click.echo(json.dumps(found, indent=1) if as_json else _text(found))
    if any(row["error"] for row in found["plugins"]):
        ctx.exit(ExitCode.PROBLEMS_FOUND)


def _text(found: dict[str, Any]) -> str:
    if not found["plugins"]:
        return f"no plug-in is installed; the groups are {', '.join(found['groups'])} (docs/extending.md)"
    lines = []
    for row in found["plugins"]:
        state = row["error"] or ("on" if row["on"] else "off")
        lines.append(f"{row['name']:<20} {row['group']:<16} {row['package']} {row['version']:<10} {state}")
    return "\n".join(lines)
