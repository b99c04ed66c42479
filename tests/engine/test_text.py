"""Text a token at a time: whole characters, stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_engine.errors import EngineError
from insitu_engine.text import Detokenizer, StopFinder, open_tokenizer


class Bytes:
    """A tokenizer whose tokens are bytes: every character beyond ASCII takes several."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text_and_hold_whole_characters(text: str) -> None:
    detokenizer = Detokenizer(Bytes())
    pieces = [detokenizer.push(token) for token in Bytes().encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    assert all(piece in text for piece in pieces)


def test_what_never_becomes_a_character_is_shown_at_the_end() -> None:
    detokenizer = Detokenizer(Bytes())
    assert detokenizer.push(0xE2) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert Detokenizer(None).push(5) + Detokenizer(None).finish() == ""


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 5), max_size=12),
)
def test_output_ends_where_the_first_stop_string_begins(text: str, stops: list[str], cuts: list[int]) -> None:
    finder, shown, at = StopFinder(stops), "", 0
    for size in [*cuts, len(text)]:
        shown += finder.push(text[at : at + size])
        at += size
        assert text.startswith(shown)
        if finder.found:
            break
    if not finder.found:
        shown += finder.finish()
    earliest_end = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    assert finder.found == (earliest_end is not None)
    if earliest_end is None:
        assert shown == text
    else:
        assert all(stop not in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    assert open_tokenizer(tmp_path) is None


def test_a_damaged_tokenizer_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(EngineError, match="tokenizer") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
