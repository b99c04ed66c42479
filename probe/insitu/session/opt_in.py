"""What a request's header `insitu`, or what stands for it, asks: `capture=rows` opts in to rules for rows. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

NAME: Final = "insitu"
"""Of the header, of the member of `baggage`, and of the argument where a server has arguments of its own."""
CAPTURE: Final = "capture"
ROWS: Final = "rows"


def wants_rows(text: Any) -> bool:
    """Return whether a header, or what stands for it, opts in to rows. Raises nothing."""
    return ROWS in _captures(text)


def unknown_word(text: Any) -> str | None:
    """Return one line about a word after `capture=` that means nothing; None where there is none. Raises nothing."""
    word = next((word for word in _captures(text) if word != ROWS), None)
    return None if word is None else f"{CAPTURE}={ascii(word)[1:-1]:.80} is not known; it may be {CAPTURE}={ROWS}"


def _captures(text: Any) -> Iterator[str]:
    for part in text.split(",") if isinstance(text, str) else ():
        key, mark, word = part.partition("=")
        if mark and key.strip() == CAPTURE:
            yield word.strip()
