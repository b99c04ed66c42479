"""Rules as text: a TOML file, one rule on a command line, and back. Raises RuleError, one line, for what is not one."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

from insitu.rules.rule import Rule, RuleError

TABLE: Final = "rules"
"""A file is an array of these: `[[rules]]`."""
FIELDS: Final = tuple(field.name for field in fields(Rule))
_NUMBERS: Final = ("requests", "every", "topk", "max_bytes_per_s")
"""Fields that may be numbers; the name of a site may look like one."""
MAX_RULES: Final = 64
"""More than this is a mistake: the first match wins, and every step asks each of them."""


def parse_toml(text: str | bytes) -> tuple[Rule, ...]:
    """Return the rules of a TOML document, in order; an empty document is no rule."""
    try:
        found = tomllib.loads(text.decode() if isinstance(text, bytes) else text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RuleError(f"not TOML: {' '.join(str(error).split())}") from None
    for key in found:
        if key != TABLE:
            raise RuleError(f"no key {key!r}; rules are [[{TABLE}]] tables with the keys {', '.join(FIELDS)}")
    tables = found.get(TABLE, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise RuleError(f"{TABLE} is no array of tables; write each rule as [[{TABLE}]]")
    if len(tables) > MAX_RULES:
        raise RuleError(f"{len(tables)} rules; the most are {MAX_RULES}: let one glob name several sites")
    return tuple(_rule(table, f"rule {number}: ") for number, table in enumerate(tables, 1))


def parse_rule(text: str) -> Rule:
    """Return the rule that a command line says: `SITES[,KEY=VALUE]...`, like `L*.resid_post,take=summary,every=64`."""
    sites, *rest = [part.strip() for part in text.split(",")]
    table: dict[str, Any] = {}
    for part in [f"sites={sites}" if not sites.startswith("sites=") else sites, *rest]:
        key, equals, value = part.partition("=")
        if not equals:
            raise RuleError(f"--rule {text!r}: {part!r} is no KEY=VALUE; the keys are {', '.join(FIELDS)}")
        if key in table:
            raise RuleError(f"--rule {text!r}: {key} is given twice")
        table[key.strip()] = _value(value.strip()) if key.strip() in _NUMBERS else value.strip()
    return _rule(table, f"--rule {text!r}: ")


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _rule(table: Mapping[str, Any], where: str) -> Rule:
    for key in table:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise RuleError(f"{where}no key {key!r}{meant}; the keys are {', '.join(FIELDS)}")
    if "sites" not in table:
        raise RuleError(f'{where}it names no sites; write sites = "L*.resid_post" or the like')
    try:
        return Rule(**table)
    except RuleError as error:
        raise RuleError(f"{where}{error}") from None


def to_toml(rules: Sequence[Rule]) -> str:
    """Return the document that `parse_toml` reads as these rules. What a rule leaves at its default is left out."""
    return "\n".join(f"[[{TABLE}]]\n{_body(rule)}" for rule in rules)


def _body(rule: Rule) -> str:
    lines = []
    for field in fields(Rule):
        value = getattr(rule, field.name)
        if value != field.default:
            lines.append(f"{field.name} = {_quoted(value) if isinstance(value, str) else repr(value)}\n")
    return "".join(lines)


def _quoted(text: str) -> str:
    """Return a basic string of TOML."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'


def rule_text(rule: Rule) -> str:
    """Return a rule in one line, as `parse_rule` reads it."""
    others = (field for field in fields(Rule) if field.name != "sites" and getattr(rule, field.name) != field.default)
    return ",".join([rule.sites, *(f"{field.name}={getattr(rule, field.name)}" for field in others)])
