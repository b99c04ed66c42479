"""Parts of another package's statistic add up in any number of groups, and what is no statistic says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from package_kit import install

from insitu.plugins.discovery import STATISTICS, Broken, PluginError
from insitu.statistic_plugins import Statistic, checked_fields, combined, finalised, load_measures, merge

Floats = NDArray[np.float64]


class Extremes(Statistic):
    fields = ("num", "least", "greatest")

    def combine(self, a: Floats, b: Floats) -> Floats:
        return np.stack([a[:, 0] + b[:, 0], np.minimum(a[:, 1], b[:, 1]), np.maximum(a[:, 2], b[:, 2])], 1)


@given(
    parts=hnp.arrays(np.float64, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-1e6, 1e6, width=32)),
    data=st.data(),
)
def test_each_group_is_added_up_whatever_lies_between(parts: Floats, data: st.DataObject) -> None:
    group = np.array(data.draw(st.lists(st.integers(0, 5), min_size=len(parts), max_size=len(parts))))
    before = parts.copy()
    found = merge(Extremes(), parts, group)
    assert np.array_equal(parts, before)
    for row, number in zip(found, np.unique(group), strict=True):
        mine = parts[group == number]
        assert row[0] == pytest.approx(mine[:, 0].sum())
        assert (row[1], row[2]) == (mine[:, 1].min(), mine[:, 2].max())


@pytest.mark.parametrize(("num_parts", "num_calls"), [(1, 0), (2, 1), (3, 2), (64, 6), (65, 7)])
def test_it_takes_as_many_calls_as_the_largest_group_has_doublings(num_parts: int, num_calls: int) -> None:
    class Counts(Extremes):
        num_calls = 0

        def combine(self, a: Floats, b: Floats) -> Floats:
            self.num_calls += 1
            return super().combine(a, b)

    counts, group = Counts(), np.array([0] * num_parts + [1])
    assert merge(counts, np.ones((num_parts + 1, 3)), group)[:, 0].tolist() == [num_parts, 1]
    assert counts.num_calls == num_calls


def test_nothing_adds_up_to_nothing() -> None:
    assert merge(Extremes(), np.zeros((0, 3)), np.zeros(0, np.int64)).shape == (0, 3)


def test_as_it_stands_a_statistic_adds_and_tells_its_fields() -> None:
    class Sums(Statistic):
        fields = ("a", "b")

    parts = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert combined(Sums(), parts, parts).tolist() == [[2.0, 4.0], [6.0, 8.0]]
    assert {name: values.tolist() for name, values in finalised(Sums(), parts).items()} == {
        "a": [1.0, 3.0],
        "b": [2.0, 4.0],
    }


@pytest.mark.parametrize("fields", [(), ("a", "a"), ("a", 3), ("a", "")])
def test_fields_that_are_no_names_are_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(Broken, match="its fields are"):
        checked_fields(type("Odd", (), {"fields": fields})())


def test_what_does_not_fit_is_refused() -> None:
    class Short(Extremes):
        def combine(self, a: Floats, b: Floats) -> Floats:
            return a[:, :1]

        def finalise(self, parts: Floats) -> Mapping[str, NDArray[Any]]:
            return {"all": parts.sum()}

    with pytest.raises(Broken, match=r"combine of \[2, 3\] numbers and as many gave \[2, 1\]"):
        combined(Short(), np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(Broken, match="finalise gave all"):
        finalised(Short(), np.zeros((2, 3)))


CODE = """
class Good:
    fields = ("num",)

class Nothing:
    pass
"""


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"acme.good": "acme_kit:Good", "acme.nothing": "acme_kit:Nothing", "acme.gone": "no_such_module:X"}
    install(tmp_path, monkeypatch, "acme_kit", {STATISTICS: names}, CODE)


@pytest.mark.usefixtures("_package")
def test_one_is_found_by_its_name() -> None:
    measure = load_measures(["acme.good"])["acme.good"]
    assert (measure.fields, measure.plugin) == (("num",), "acme.good (acme_kit 1.0)")


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme.else", r"has the name 'acme\.else'; installed are acme\.gone, acme\.good, acme\.nothing"),
        ("acme.gone", "acme_kit 1.0.* cannot be loaded: ModuleNotFoundError"),
        ("acme.nothing", "cannot be loaded: Broken: its fields are"),
    ],
)
def test_one_that_cannot_be_used_says_why(name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_measures([name])


@pytest.mark.usefixtures("_package")
def test_one_that_is_switched_off_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("INSITU_PLUGINS_OFF", "acme.gone")
    assert list(load_measures(["acme.gone", "acme.good"])) == ["acme.good"]
    assert "acme.gone is switched off" in caplog.text
