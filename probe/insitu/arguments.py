"""What the arguments of the verbs may be: a line at the call, in place of records that are lost later. Pure."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Final

from insitu.config import FILE, SETTINGS, ConfigError
from insitu.identity import Source
from insitu.rules.rule import Rule, RuleError
from insitu.vocabulary import NO_RANK, Role

MOST: Final = 2**15 - 1
"""Of what `records.py` keeps as int16."""
_PLACES: Final = ("replica", "dp_rank", "tp_rank", "pp_rank", "ep_rank")
ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "attach": (
        *("to", "spool", "rules", "role", "rank", "stage", "model_name"),
        *("max_rows", "axes", "flight", "overhead_budget", "t0"),
    ),
    "start": ("to", "spool", "role", "model", "rank", "stage"),
    "observe": ("to", "spool", "role", "rank", "stage"),
}
"""Of each verb, beside fields of the source. `observe`: of a step function; of a model they are those of `attach`."""
_FIELDS: Final = tuple(field.name for field in fields(Source))
_SETTINGS: Final = {each.name: each for each in SETTINGS}


def source_of(role: str, *, rank: int = NO_RANK, stage: int = NO_RANK, **further: Any) -> Source:
    """Return the source that these say; `further` are fields of it. Raises ConfigError, one line, for a bad number."""
    try:
        known = Role(role)
    except ValueError:
        raise ConfigError(f"role: {role!r} is not known; it may be {', '.join(Role)}") from None
    least = 0 if known is Role.RANK else NO_RANK
    places = {"rank": _number("rank", rank, least), "stage": _number("stage", stage, least)}
    places |= {name: _number(name, further[name], 0) for name in _PLACES if name in further}
    return Source(role=known, **{**further, **places})


def check_arguments(verb: str, further: Iterable[str]) -> None:
    """Raise ConfigError, one line, where a verb was given what is neither its argument nor a field of the source."""
    if unknown := [name for name in further if name not in _FIELDS]:
        raise ConfigError(f"there is no argument {unknown[0]!r}; {_instead(verb, unknown[0])}")


def _instead(verb: str, name: str) -> str:
    own, elsewhere = (*ARGUMENTS[verb], *_FIELDS), (*ARGUMENTS["attach"], *_SETTINGS)
    if name in elsewhere:
        return _where(name)
    near = get_close_matches(name, dict.fromkeys((*own, *elsewhere)), n=1)
    meant = f"{near[0]!r} may be meant; " if near else ""
    if near and near[0] not in own:
        return f"{meant}{_where(near[0])}"
    return f"{meant}help(insitu.{verb}) has the list, and fields of the source are {', '.join(_FIELDS)}"


def _where(name: str) -> str:
    """Return where something can be set that is no argument here."""
    if name in ARGUMENTS["attach"]:
        return "insitu.attach takes it, which has a model to observe"
    setting = _SETTINGS[name]
    return f"the variable {setting.variable} sets it" if setting.variable else f"{setting.key} in {FILE} sets it"


def _number(name: str, value: Any, least: int) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= MOST:
        raise ConfigError(f"{name}: {value!r} is no such number; write a whole one from {least} to {MOST}")
    return number


def rules_of(rules: Any) -> Sequence[Rule]:
    """Return the rules as a tuple. Raises RuleError, one line, where it is no list of rules."""
    if isinstance(rules, list | tuple | set | frozenset) and all(isinstance(each, Rule) for each in rules):
        return tuple(rules)
    raise RuleError(f'rules: {rules!r:.200} is no list of rules; write rules=[insitu.Rule(sites="*")]')


def seconds(name: str, value: Any) -> None:
    """Raise ValueError, one line, for what is no number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name}: {value!r:.80} is no number of seconds; write it like 5.0")
