"""Which store this is: a random number made once, so that a forwarder tells it from another one at the same address."""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path
from typing import Final

from insitu.segments.layout import FORMAT, make_folder, sync_folder

_ID: Final = re.compile(r"[0-9a-f]{32}")

_log = logging.getLogger("insitu")


def store_id(store: Path) -> str | None:
    """Return what `STORE/v1/id` says, made where there is none; None where it cannot be kept, which is logged.

    The caller writes the store, and nobody else does.
    """
    path = store / FORMAT / "id"
    try:
        if path.exists() and _ID.fullmatch(known := path.read_text().strip()):
            return known
        return _make(path)
    except (OSError, UnicodeDecodeError) as error:
        _log.warning("insitu: %s cannot be kept (%s); forwarders send anew what they have sent", path, error)
        return None


def _make(path: Path) -> str:
    made = secrets.token_hex(16)
    make_folder(path.parent)
    draft = path.with_suffix(".draft")
    with draft.open("w") as file:
        file.write(made + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)
    return made
