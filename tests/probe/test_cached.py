"""Attributes that are computed once, and hold up nobody."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from insitu.cached import cached


class Slow:
    """Says when it computes, and goes on when it is told to."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.is_in, self.may_go = threading.Event(), threading.Event()

    @cached
    def number(self) -> int:
        """A number."""
        self.num_calls += 1
        self.is_in.set()
        assert self.may_go.wait(20)
        return 5


def test_it_is_computed_when_it_is_first_read_and_kept() -> None:
    one = Slow()
    one.may_go.set()
    assert one.num_calls == 0
    assert (one.number, one.number) == (5, 5)
    assert one.num_calls == 1


def test_its_class_has_its_words() -> None:
    assert Slow.number.__doc__ == "A number."


def test_nobody_waits_for_another_who_computes() -> None:
    """`functools.cached_property` of Python 3.11 lets one compute at a time, of all instances."""
    one, other = Slow(), Slow()
    other.may_go.set()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(lambda: one.number)
        assert one.is_in.wait(20)
        try:
            assert threads.submit(lambda: other.number).result(10) == 5
        finally:
            one.may_go.set()
        assert first.result(10) == 5
