"""What `to` may be: one URL, or one exporter. A session has one destination, and says so before it opens any."""

from __future__ import annotations

import os
import re
from typing import Any, Final
from urllib.parse import urlsplit

_BETWEEN: Final = re.compile(r"[\s,;]+(?=[a-z][a-z0-9+.\-]*://)", re.IGNORECASE)
"""What stands between two URLs. A comma within one is followed by no scheme."""


def one_destination(to: Any) -> Any:
    """Return `to` as it is: a URL, or an object with `export`. Raises ValueError, one line, for several and for others.

    What the URL means is not looked at: `open_exporter` does that.
    """
    if isinstance(to, list | tuple | set | frozenset):
        given = [str(each) for each in to]
    else:
        given = _BETWEEN.split(to.strip()) if isinstance(to, str) else [to]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are {len(given)} destinations, and a session has one: send to a collector "
            "(grpc://) that runs with `insitu collect --otlp-to URL`: it keeps all and sends it on (docs/otel.md)"
        )
    if isinstance(to, str) or callable(getattr(to, "export", None)):
        return to
    raise ValueError(f"{to!r} is no destination; write a URL like file://./insitu-store, or give an Exporter")


def scheme_of(to: Any) -> str:
    """Return the scheme of a URL, in lower case however it is written; "" of what has none, and of an exporter."""
    try:
        return urlsplit(to).scheme if isinstance(to, str) else ""
    except ValueError:  # no URL: whoever opens it says so
        return ""


def folder_now() -> str:
    """Return where a path like `./insitu-store` begins now; "" in a folder that has gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""
