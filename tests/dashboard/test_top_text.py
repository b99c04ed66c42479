"""What `insitu top` says: bars that add up, and lines that leave out what is not known."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.vocabulary import LedgerClass
from insitu_dashboard import top_text
from insitu_dashboard.notices import State
from insitu_dashboard.picture import blank_picture, picture
from insitu_dashboard.run_view import RunView

SHARES = st.dictionaries(st.sampled_from([str(cls) for cls in LedgerClass]), st.floats(0.001, 1.0), min_size=1)


@pytest.fixture
def shown(view: RunView) -> Any:
    end = view.last_ns or 0
    return picture(view, view.timeline.unix_ns(end), 60, run="ab" * 8, replica=0)


@given(classes=SHARES, width=st.integers(1, 200))
def test_a_bar_fills_its_width_and_no_class_is_off_by_a_cell(classes: dict[str, float], width: int) -> None:
    found = top_text.bar(classes, width)
    assert sum(cells for _, cells in found) == width
    total = sum(classes.values())
    drawn = dict(found)
    for name, share in classes.items():
        assert abs(drawn.get(LedgerClass(name), 0) - width * share / total) < 1
    shares = [classes[cls] for cls, _ in found]
    assert shares == sorted(shares, reverse=True)


def test_without_time_there_is_no_bar() -> None:
    assert top_text.bar({}, 40) == []


def test_the_whole_says_what_limits_what_helps_and_what_each_rank_does(shown: Any) -> None:
    text = top_text.plain(shown, 120)
    assert "stage 1 limits the pipeline" in text
    assert "What helps: " in text
    assert "rank 1  compute" in text
    assert "C compute" in text and "D waits downstream" in text
    assert all(len(line) <= 120 for line in text.splitlines() if "  rank " in line)


def test_a_hang_is_shown_instead_of_what_the_rank_mostly_did(shown: Any) -> None:
    shown["grid"][0]["open"] = {"text": "recv_wait on rank 1", "s": 12.44}
    assert top_text.rank_line(shown["grid"][0]) == "stage 0  rank 0  recv_wait on rank 1 12.4 s"


def test_many_alarms_are_counted(shown: Any) -> None:
    shown["alarms"] = shown["alarms"][:1] * 11
    lines = top_text.alarms(shown)
    assert len(lines) == top_text.MOST_ALARMS + 1
    assert lines[-1].startswith("and 3 older ones")


def test_nothing_recorded_yet_says_what_to_do() -> None:
    text = top_text.plain(blank_picture(State.EMPTY), 80)
    assert "insitu demo" in text
    assert "None" not in text


@pytest.mark.parametrize(("num_requests", "said"), [(0, ""), (1, ", 1 request affected"), (2, ", 2 requests affected")])
def test_a_verdict_says_for_how_many_requests_if_for_any(num_requests: int, said: str) -> None:
    verdict = {"text": "so", "remedy": "this", "confidence": 1.0, "num_requests": num_requests}
    assert top_text.verdicts({"verdicts": [verdict]}) == [f"so\n  What helps: this\n  confidence 100 %{said}"]
