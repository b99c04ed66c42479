"""What the value of a setting may be, as text or as an object: parsed, or refused in a line (ValueError). Pure."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from insitu.destinations import one_destination
from insitu.segments.retention import bytes_text, parse_age, parse_bytes
from insitu.session.row_map import AXES, is_unicode

LEAST_QUEUE_BYTES: Final = 1 << 20
"""A frame is about as large; less would drop everything."""
_SWITCH: Final = {
    **dict.fromkeys(("", "0", "false", "no", "off"), False),
    **dict.fromkeys(("1", "true", "yes", "on"), True),
}
_RUN: Final = re.compile(r"[0-9a-fA-F]{16}")


def as_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text; write it in quotes")
    return value


def as_folder(value: Any) -> str:
    text = as_text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if "\0" in text:
        raise ValueError(f"{text!a:.200} names no folder; write one like ./insitu-spool")
    return text


def as_destination(value: Any) -> Any:
    if not isinstance(value, str):
        return one_destination(value)
    if not is_unicode(value):  # bytes of the environment that are no UTF-8
        raise ValueError(f"{value!a:.200} is no text; write a URL of Unicode characters like file://./insitu-store")
    return one_destination(as_text(value))


def is_on(value: Any) -> bool:
    """Return what a switch says. Raises ValueError for a text that says neither."""
    said = value if isinstance(value, bool) else _SWITCH.get(str(value).strip().lower())
    if said is None:
        raise ValueError(f"{value!r} is no switch; write 1 (or true, yes, on) or 0 (or false, no, off)")
    return said


def as_count(value: Any) -> int:
    try:
        count = 0 if isinstance(value, bool | float) else int(value)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise ValueError(f"{value!r} is no count; write a whole number from 1")
    return count


def as_budget(value: Any) -> float:
    try:
        budget = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        budget = math.nan
    if not 0 < budget <= 1:
        raise ValueError(
            f"{value!r} is no share of step time; write a number above 0 and up to 1, like 0.01. To take nothing "
            "at all set INSITU_DISABLED=1"
        )
    return budget


def as_tier(value: Any) -> str:
    if value not in ("all", "boundary"):
        raise ValueError(f'{value!r} is not known; it may be "all" or "boundary"')
    return str(value)


def as_axes(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(axis, str) for axis in value.values()):
        raise ValueError(f'{value!r} is no table; write it like {{ "logits" = "samples" }}')
    for glob, axis in value.items():
        if not isinstance(glob, str) or axis not in AXES:
            raise ValueError(f"{glob!r} = {axis!r} is no axis of a site; it may be {', '.join(AXES)}")
    return dict(value)


def as_run(value: Any) -> str:
    if not isinstance(value, str) or not _RUN.fullmatch(value):
        raise ValueError(f"{value!r} is no run; write 16 hex digits, or leave it out")
    return value


def as_names(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} is no list of names; write it like name,name")
    return tuple(name.strip() for name in names if name.strip())


def as_urls(value: Any) -> tuple[str, ...]:
    urls = value.split() if isinstance(value, str) else value
    if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
        raise ValueError("it is no list of URLs; write them with spaces between")
    return tuple(urls)


def without_secret(url: str | None) -> str | None:
    """Return an address without user, path and query: whoever knows those of a webhook may use it."""
    parts = urlsplit(url or "")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if url else None


def without_secrets(urls: Sequence[str]) -> list[str | None]:
    return [without_secret(url) for url in urls]


def as_bytes(value: Any) -> int | None:
    return parse_bytes(str(value))


def as_queue_bytes(value: Any) -> int:
    num_bytes = parse_bytes(str(value))
    if num_bytes is None or num_bytes < LEAST_QUEUE_BYTES:
        raise ValueError(f"{value!r} is no bound; write {bytes_text(LEAST_QUEUE_BYTES)} or more")
    return num_bytes


def as_age(value: Any) -> float | None:
    return parse_age(str(value))
