"""The card of a run in a notebook."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from replica_kit import of_engines

from insitu_collector.simulate import Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store
from insitu_collector.views.card import MOST_VERDICTS
from insitu_collector.views.stalls import Stalls, stalls_of


class Page(HTMLParser):
    """The text of a page, its tags, and whether each was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", set[str](), list[str]()
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Stalls:
    path = tmp_path_factory.mktemp("card") / "store"
    write_store(simulate(Scenario(seed=5, seconds=8.0, faults=(Fault("slow", 2.0, 1, ms=15.0),))), str(path))
    told = stalls_of(open_store(path))
    assert told is not None
    return told


def test_a_card_says_verdict_remedy_and_where_the_time_went(found: Stalls) -> None:
    page = Page(found._repr_html_())
    (verdict,) = found.verdicts
    assert verdict.text in page.text
    assert f"What helps: {verdict.remedy}" in page.text
    assert "stage 1, rank 1" in page.text
    assert found.ledger is not None
    window = found.ledger.t1_ns - found.ledger.t0_ns
    assert f"Where the time went, {window / 1e9:.1f} s from the first step to the last" in page.text
    assert "of traffic" not in page.text
    assert "The record is partial" not in page.text


def test_text_of_a_record_is_text_and_never_markup(found: Stalls) -> None:
    evil = "<script>alert(1)</script><img src=x onerror='x'>\"&"
    verdicts = [replace(verdict, text=evil, remedy=evil) for verdict in found.verdicts]
    page = Page(replace(found, verdicts=verdicts, store=evil, run=evil, missing={evil: 3})._repr_html_())
    assert page.text.count(evil) == 5
    assert not page.tags & {"script", "img"}


def test_what_is_not_there_is_said(found: Stalls) -> None:
    page = Page(replace(found, verdicts=[], ledger=None, missing={"ring_full": 3})._repr_html_())
    assert "No verdict: nothing was judged yet." in page.text
    assert "The record is partial: rows missing: 3 (ring_full)." in page.text
    many = Page(replace(found, verdicts=found.verdicts * (MOST_VERDICTS + 2))._repr_html_())
    assert many.text.count("What helps:") == MOST_VERDICTS
    assert "and 2 more" in many.text


def test_each_replica_of_a_run_has_its_part_of_the_card(tmp_path: Path) -> None:
    slow = Fault("slow", 2.0, 1, replica=1, ms=15.0)
    write_store(of_engines(Scenario(seed=5, seconds=8.0, replicas=2, faults=(slow,))), str(tmp_path))
    store = open_store(tmp_path)
    _, first, second = Page(store.stalls()._repr_html_()).text.split("Replica ")
    assert "stage 1 limits the pipeline" in second and "stage 1 limits" not in first
    assert ("stage 1, rank 1" in first, "stage 1, rank 3" in second) == (True, True)
    alone = Page(store.stalls(replica=1)._repr_html_())
    assert "Replica 1" in alone.text and "rank 1" not in alone.text
