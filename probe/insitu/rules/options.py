"""Rules on a command line: `--rules FILE`, `--rule RULE`, `--axis SITES=AXIS`, and their errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from insitu.cli import ExitCode
from insitu.rules.rule import Rule, RuleError
from insitu.rules.text import parse_rule, parse_toml
from insitu.session.row_map import AXES

Command = TypeVar("Command", bound=Callable[..., Any])


class BadRules(click.ClickException):
    """Rules that cannot be followed: one line, and the exit status of a usage error."""

    exit_code = ExitCode.USAGE


def rule_options(command: Command) -> Command:
    """Add --rules and --rule to a command."""
    for option in (
        click.option("--rule", "texts", metavar="RULE", multiple=True, help="SITES[,KEY=VALUE]... Repeatable."),
        click.option("--rules", "file", metavar="FILE", help="TOML file of [[rules]] (docs/probe.md)."),
    ):
        command = option(command)
    return command


def read_rules(file: str | None, texts: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules of a file, then those of the command line. Raises BadRules, one line."""
    try:
        found = parse_toml(Path(file).read_bytes()) if file is not None else ()
    except OSError as error:
        raise BadRules(f"{file} cannot be read: {error.strerror}; give a TOML file of [[rules]]") from None
    except RuleError as error:
        raise BadRules(f"{file}: {error}") from None
    try:
        return (*found, *map(parse_rule, texts))
    except RuleError as error:
        raise BadRules(str(error)) from None


def read_axes(texts: Sequence[str]) -> dict[str, str]:
    """Return site glob -> axis, of `--axis SITES=AXIS`. Raises BadRules, one line."""
    found = {}
    for text in texts:
        glob, _, axis = text.rpartition("=")
        if not glob or axis not in AXES:
            raise BadRules(f"--axis {text!r}: write SITES=AXIS with an axis of {', '.join(AXES)}, like logits=samples")
        found[glob] = axis
    return found
