"""Addresses: what is chosen survives being sent to somebody, and nonsense is the default."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import LedgerClass
from insitu_dashboard.links import NAMES, Link, Selected, parse, query
from insitu_dashboard.picture import DEFAULT_WINDOW_S, WINDOWS_S

unix_ns = st.integers(1, 2**62)
classes = st.sampled_from([str(cls) for cls in LedgerClass])
windows = st.tuples(unix_ns, unix_ns).filter(lambda pair: pair[0] != pair[1]).map(sorted)


@st.composite
def links(draw: st.DrawFn) -> Link:
    window = draw(st.none() | windows)
    is_live = draw(st.booleans())
    paused = draw(unix_ns) if window is None and not is_live else None
    return Link(
        run=draw(st.none() | st.from_regex(r"[0-9a-f]{16}", fullmatch=True)),
        window_s=draw(st.sampled_from(WINDOWS_S)),
        is_live=is_live,
        t0_ns=window[0] if window else None,
        t1_ns=window[1] if window else paused,
        stages=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
        ranks=tuple(draw(st.lists(st.integers(0, 99), max_size=3))),
        classes=tuple(draw(st.lists(classes, max_size=3))),
        selected=draw(st.none() | st.builds(Selected, st.integers(0, 999), unix_ns, classes, st.integers(0, 2**40))),
        with_table=draw(st.booleans()),
    )


@given(link=links())
def test_an_address_says_all_that_is_chosen(link: Link) -> None:
    said = query(link)
    assert parse(said) == link
    assert set(said) <= set(NAMES)


def test_the_default_needs_no_words() -> None:
    assert query(Link()) == {}
    assert parse({}) == Link(window_s=DEFAULT_WINDOW_S)


@given(words=st.dictionaries(st.sampled_from(NAMES), st.text(max_size=30)))
def test_anybody_may_write_an_address(words: dict[str, str]) -> None:
    found = parse(words)
    assert parse(query(found)) == found


@pytest.mark.parametrize(
    "words",
    [
        {"win": "7"},
        {"t0": "5"},
        {"t0": "9", "t1": "5"},
        {"live": "0"},
        {"cls": "nonsense"},
        {"sel": "1.2.3"},
        {"sel": "1.2.3.nonsense"},
    ],
)
def test_nonsense_is_the_default(words: dict[str, str]) -> None:
    found = parse(words)
    assert (found.run, found.window_s, found.t0_ns, found.classes, found.selected) == (None, 60, None, (), None)
    assert found.paused_ns is None
