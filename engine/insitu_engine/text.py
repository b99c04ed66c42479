"""Between text and token ids, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from insitu_engine.errors import EngineError, one_line

_UNFINISHED: Final = "\ufffd"
"""What a decoder puts where the bytes of a character are not all there yet."""
_LONGEST_CHARACTER: Final = 8
"""After so many tokens without a whole character, the replacement is what the text holds."""


class Tokenizer(Protocol):
    """What the engine uses of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        ...


class CheckpointTokenizer:
    """The tokenizer of a checkpoint folder."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:
            raise EngineError(f"the tokenizer in {path} cannot be read: {one_line(error)[:160]}") from None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def open_tokenizer(path: Path) -> Tokenizer | None:
    """Return the checkpoint's tokenizer, or None where it has none. Raises EngineError for a damaged one."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return CheckpointTokenizer(path) if any((path / name).is_file() for name in names) else None


class Detokenizer:
    """Turns ids into text as they come, holding back characters whose bytes are not complete."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0
        self._end = 0

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._begin : self._end])
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith(_UNFINISHED) and len(self._ids) - self._end < _LONGEST_CHARACTER:
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        """Return what was held back."""
        if self._tokenizer is None or self._end == len(self._ids):
            return ""
        known = self._tokenizer.decode(self._ids[self._begin : self._end])
        text = self._tokenizer.decode(self._ids[self._begin :])
        self._begin = self._end = len(self._ids)
        return text[len(known) :]


class StopFinder:
    """Passes text on until a stop string appears, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that is safe to show; after a stop string, nothing more."""
        if self.found:
            return ""
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
