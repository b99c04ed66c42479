"""`insitu config show`: every setting, its value, and where it came from."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from insitu.cli import ExitCode
from insitu.config import ONLY_ARGUMENTS, SETTINGS, Config, ConfigError, Origin, Setting, load

SCHEMA: Final = "insitu.config/1"


class BadConfig(click.ClickException):
    """A setting that cannot be used: one line, and the exit status of a usage error."""

    exit_code = ExitCode.USAGE


def load_for_command(**arguments: Any) -> Config:
    """Return the settings of a command. Raises BadConfig, one line; says on stderr which variables mean nothing."""
    try:
        config = load(**arguments)
    except ConfigError as error:
        raise BadConfig(str(error)) from None
    for warning in config.warnings():
        click.echo(f"insitu: {warning}", err=True)
    return config


def document(config: Config) -> dict[str, Any]:
    """Return what `--json` prints."""
    rows = [_row(setting, getattr(config, setting.name), config) for setting in SETTINGS]
    rows += [_row(setting, setting.default, config) for setting in ONLY_ARGUMENTS]
    return {
        "schema": SCHEMA,
        "file": str(config.file) if config.file else None,
        "settings": rows,
        "warnings": config.warnings(),
    }


def _row(setting: Setting, value: Any, config: Config) -> dict[str, Any]:
    return {
        "name": setting.name,
        "value": setting.show(value),
        "from": str(config.origin(setting.name)),
        "variable": setting.variable,
        "key": setting.key,
        "help": setting.help,
    }


def table(config: Config) -> str:
    """Return the settings as aligned lines: name, value, origin, and what it is."""
    lines = []
    for row in document(config)["settings"]:
        origin = {Origin.ENVIRONMENT: row["variable"], Origin.FILE: str(config.file)}.get(row["from"], row["from"])
        if not row["variable"] and not row["key"]:
            origin = "argument only"
        value = row["value"] if isinstance(row["value"], str) else json.dumps(row["value"])
        lines.append(f"{row['name']:<11} {value:<22} {origin:<18} {row['help']}")
    return "\n".join(lines)


@click.group()
def config() -> None:
    """Say what is set, and by what: an argument, an INSITU_* variable, insitu.toml (or [tool.insitu] in
    pyproject.toml), or the default.

    \b
    insitu config show
    insitu config show --json | python -m json.tool
    """


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
def show(as_json: bool) -> None:
    """Print every setting, its value, and where it came from, as attach, start and serve would use it here.

    \b
    insitu config show
    insitu config show --json | python -m json.tool
    """
    found = load_for_command()
    click.echo(json.dumps(document(found), indent=2) if as_json else table(found))
