"""What a request's header asks of insitu, and the line about a word that means nothing."""

from __future__ import annotations

import pytest

from insitu.session.opt_in import unknown_word, wants_rows


@pytest.mark.parametrize("text", ["capture=rows", "a=b, capture=rows", "capture = rows"])
def test_rows_are_asked_for_by_one_word(text: str) -> None:
    assert wants_rows(text)
    assert unknown_word(text) is None


@pytest.mark.parametrize("text", [None, "", 1, ["capture=rows"], "a=b", "rows", "captured=rows"])
def test_what_says_nothing_of_it_asks_for_nothing_and_is_no_mistake(text: object) -> None:
    assert not wants_rows(text)
    assert unknown_word(text) is None


@pytest.mark.parametrize(("text", "word"), [("capture=row", "row"), ("a=b, capture=all", "all"), ("capture=", "")])
def test_another_word_is_told_with_the_one_that_there_is(text: str, word: str) -> None:
    assert not wants_rows(text)
    assert unknown_word(text) == f"capture={word} is not known; it may be capture=rows"


def test_a_word_forges_no_line_of_a_log() -> None:
    told = unknown_word("capture=x\ninsitu: all is well")
    assert told == r"capture=x\ninsitu: all is well is not known; it may be capture=rows"
