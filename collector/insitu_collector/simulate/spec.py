"""Faults as a person writes them: KIND=PLACE:SIZE@START-END."""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from insitu_collector.simulate.scenario import Fault


class _Form(NamedTuple):
    kind: str
    takes: str
    """How it is written, after the sign of equality."""
    sizes: tuple[str, ...] = ()
    """The fields of `Fault` that the numbers after the place are; those that begin with ? may be left out."""
    fixed: tuple[tuple[str, Any], ...] = ()
    has_place: bool = True


_FORMS: Final = {
    "slow": _Form("slow", "RANKS:MS", ("ms",)),
    "slow-computing": _Form("slow", "RANKS:MS", ("ms",), (("on_cpu", True),)),
    "slow-link": _Form("slow_link", "RANKS:MS", ("ms",)),
    "fail-slow": _Form("fail_slow", "RANKS|HOST:FACTOR[:RAMP_S]", ("factor", "?ramp_s")),
    "gc": _Form("gc", "RANKS:MS[:EVERY_S]", ("ms", "?every_s")),
    "hang": _Form("hang", "RANKS:MS", ("ms",)),
    "hang-collective": _Form("hang_collective", "RANKS:MS", ("ms",)),
    "nan": _Form("nan", "RANKS:LAYER", ("layer",)),
    "kv-small": _Form("kv_small", "TOKENS", ("size",), has_place=False),
    "long-prompts": _Form("long_prompts", "TOKENS[:SHARE]", ("size", "?share"), has_place=False),
    "underfilled": _Form("underfilled", "SLOTS", ("size",), has_place=False),
    "silent-site": _Form("silent_site", "RANKS"),
    "drop": _Form("drop", "RANKS:SHARE", ("share",)),
    "experts": _Form("experts", "RANKS:LAYER:SHARE", ("layer", "share")),
    "foreign": _Form("foreign", "HOST:CORES", ("size",)),
    "clock-offset": _Form("clock_offset", "HOST:MS", ("ms",)),
    "clock-jump": _Form("clock_jump", "HOST:MS", ("ms",)),
    "clock-unknown": _Form("clock_unknown", "HOST"),
}
FORMS: Final = ", ".join(f"{word}={form.takes}" for word, form in _FORMS.items())
_SHAPE: Final = re.compile(r"(?P<word>[a-z-]+)=(?P<values>[^@]+)(?:@(?P<at>[0-9.]+)(?:-(?P<until>[0-9.]+))?)?")
_RANKS: Final = re.compile(r"(?:r(?P<replica>\d+)/)?(?P<stage>\d+)(?:\.(?P<tp>\d+))?")
_HOST: Final = re.compile(r"h(?P<host>\d+)")


def parse_fault(text: str) -> Fault:
    """Return the fault that a SPEC means. Raises ValueError, in one line, for anything else."""
    found = _SHAPE.fullmatch(text)
    form = _FORMS.get(found["word"]) if found else None
    if found is None or form is None:
        raise ValueError(f"fault {text!r} is not known; it may be {FORMS}")
    values = found["values"].split(":")
    try:
        fields = _place(form, values.pop(0)) if form.has_place else {}
        fields |= _sizes(form, values)
        times = (("at_s", "at"), ("until_s", "until"))
        fields |= {name: float(found[word]) for name, word in times if found[word]}
    except (ValueError, IndexError):
        raise ValueError(f"fault {text!r} is not {found['word']}={form.takes}[@START[-END]]") from None
    return Fault(form.kind, **fields, **dict(form.fixed))


def _place(form: _Form, text: str) -> dict[str, Any]:
    """Return the fields that a place is: [rREPLICA/]STAGE[.TP], or hHOST."""
    pattern = _HOST if form.takes.startswith("HOST") or ("HOST" in form.takes and text.startswith("h")) else _RANKS
    found = pattern.fullmatch(text)
    if found is None:
        raise ValueError
    return {name: int(value) for name, value in found.groupdict().items() if value is not None}


def _sizes(form: _Form, values: list[str]) -> dict[str, Any]:
    fewest = sum(not name.startswith("?") for name in form.sizes)
    if not fewest <= len(values) <= len(form.sizes):
        raise ValueError
    named = {name.removeprefix("?"): value for name, value in zip(form.sizes, values, strict=False)}
    return {name: int(value) if name == "layer" else float(value) for name, value in named.items()}
