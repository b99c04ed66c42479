"""What went wrong with the files of a shard, a line for each cause: one disk fails or goes under all of them."""

from __future__ import annotations

import logging

_log = logging.getLogger("insitu")


class Troubles:
    """Takes what is wrong with each file, and says it by cause: the first file by name, of the others how many."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, str], list[object]] = {}

    def note(self, level: int, file: object, what: str) -> None:
        """level: of the log. file: its path or name. what: goes on after that, and is the same for each of a cause."""
        self._files.setdefault((level, what), []).append(file)

    def tell(self) -> None:
        """Say what was noted, once."""
        found, self._files = self._files, {}
        for (level, what), (first, *others) in found.items():
            more = f"{len(others)} more file{'s' if len(others) > 1 else ''}"
            _log.log(level, "insitu: %s %s%s", first, what, f" (so it is with {more})" if others else "")


def reason(error: OSError) -> str:
    """Return an error without the path in it, as it is the same for each file."""
    return (error.strerror or str(error)).lower()
