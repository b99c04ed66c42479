"""What the arguments of the verbs may be: a line at the call, in place of records that are lost later. Pure."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Final

import pyarrow as pa

from insitu.config import SETTINGS, ConfigError
from insitu.identity import Source
from insitu.records import schema_of
from insitu.rules.rule import Rule, RuleError
from insitu.session.row_map import check_text
from insitu.setting_values import as_run
from insitu.settings_file import FILE
from insitu.vocabulary import HIGHEST_RANK, NO_RANK, Role

MOST: Final = HIGHEST_RANK
"""Of what `records.py` keeps as int16."""
ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "attach": (
        *("to", "spool", "rules", "role", "rank", "stage", "model_name"),
        *("max_rows", "axes", "flight", "overhead_budget", "t0"),
    ),
    "start": ("to", "spool", "role", "model", "rank", "stage"),
    "observe": ("to", "spool", "role", "rank", "stage"),
}
"""Of each verb, beside fields of the source. `observe`: of a step function; of a model they are those of `attach`."""
_FIELDS: Final = {field.name: field for field in fields(Source)}
_OF_THE_MODEL: Final = ("plan_digest", "param_bytes")
"""Fields that `attach` finds out itself."""
_SETTINGS: Final = {each.name: each for each in SETTINGS}


def source_of(role: str, *, rank: int = NO_RANK, stage: int = NO_RANK, **further: Any) -> Source:
    """Return the source that these say; `further` are fields of it, each as its column in `sources` can keep it.

    Raises ConfigError, one line that names the field, for a bad value.
    """
    try:
        known = Role(role)
    except ValueError:
        raise ConfigError(f"role: {role!r} is not known; it may be {', '.join(Role)}") from None
    least = 0 if known is Role.RANK else NO_RANK
    rank, stage = _number("rank", rank, least), _number("stage", stage, least)
    return Source(role=known, rank=rank, stage=stage, **{name: _field(name, further[name]) for name in further})


def check_arguments(verb: str, further: Iterable[str]) -> None:
    """Raise ConfigError, one line, where a verb was given what is neither its argument nor a field of the source."""
    for name in [name for name in further if name not in _fields_of(verb)]:
        if name in _FIELDS:
            raise ConfigError(f"{name}: insitu finds it out from the model; leave it out")
        raise ConfigError(f"there is no argument {name!r}; {_instead(verb, name)}")


def text(name: str, value: Any) -> str:
    """Return a text as it is. Raises ConfigError, one line, for what is none."""
    try:
        check_text(name, value)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return str(value)


def _fields_of(verb: str) -> list[str]:
    """Return the fields of a source that a verb takes. `model` of `attach` is the model itself."""
    left_out = (*_OF_THE_MODEL, "model") if verb == "attach" else ()
    return [name for name in _FIELDS if name not in left_out]


def _instead(verb: str, name: str) -> str:
    known = _fields_of(verb)
    own, elsewhere = (*ARGUMENTS[verb], *known), (*ARGUMENTS["attach"], *_SETTINGS)
    if name in elsewhere:
        return _where(name)
    near = get_close_matches(name, dict.fromkeys((*own, *elsewhere)), n=1)
    meant = f"{near[0]!r} may be meant; " if near else ""
    if near and near[0] not in own:
        return f"{meant}{_where(near[0])}"
    return f"{meant}help(insitu.{verb}) has the list, and fields of the source are {', '.join(known)}"


def _where(name: str) -> str:
    """Return where something can be set that is no argument here."""
    if name in ARGUMENTS["attach"]:
        return "insitu.attach takes it, which has a model to observe"
    setting = _SETTINGS[name]
    return f"the variable {setting.variable} sets it" if setting.variable else f"{setting.key} in {FILE} sets it"


def _field(name: str, value: Any) -> Any:
    if value is None and _FIELDS[name].default is None:
        return None
    if name == "run":
        return _run(value)
    column = schema_of("sources").field(name).type
    if not pa.types.is_integer(column):
        return text(name, value)
    num_bits = column.bit_width - pa.types.is_signed_integer(column)
    return _number(name, value, 0, 2**num_bits - 1)


def _run(value: Any) -> str:
    try:
        return as_run(value)
    except ValueError as error:
        raise ConfigError(f"run: {error}") from None


def _number(name: str, value: Any, least: int, most: int = MOST) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ConfigError(f"{name}: {value!r:.80} is no such number; write a whole one from {least} to {most}")
    return number


def rules_of(rules: Any) -> Sequence[Rule]:
    """Return the rules as a tuple. Raises RuleError, one line, where it is no list of rules."""
    if isinstance(rules, list | tuple | set | frozenset) and all(isinstance(each, Rule) for each in rules):
        return tuple(rules)
    raise RuleError(f'rules: {rules!r:.200} is no list of rules; write rules=[insitu.Rule(sites="*")]')


def seconds(name: str, value: Any) -> None:
    """Raise ValueError, one line, for what is no number of seconds, or none that a float can hold."""
    try:
        is_one = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:
        is_one = False
    if not is_one:
        raise ValueError(f"{name}: {value!r:.80} is no number of seconds; write it like 5.0")
