"""What the verbs are given and cannot use is one line at the call, a ValueError, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording

NUMBERS: list[dict[str, Any]] = [{"rank": value} for value in ("a", 10**9, -5, -1, 1.5, True)]
NUMBERS += [{"stage": "x"}, {"stage": 2**15}, {"replica": -1}, {"tp_rank": "a"}, {"role": "chief"}]
RULE = insitu.Rule(sites="*")
SETTINGS: list[dict[str, Any]] = [
    {"axes": {"*": "bogus"}},
    {"axes": {3: "tokens"}},
    {"axes": 3},
    {"max_rows": 0},
    {"max_rows": []},
    {"flight": 3},
    {"rules": "abc"},
    {"rules": [3]},
    {"rules": RULE},
    {"rules": None},
    {"no_such": 3},
    {"to": "grpc://h:99999"},
    {"to": "grpc://h:0"},
    {"to": "otlp://h:bad"},
    {"to": "otlp://h:99999"},
]


@pytest.mark.parametrize("given", [*NUMBERS, *SETTINGS], ids=str)
def test_attach_says_in_a_line_what_it_cannot_use(given: dict[str, Any], insitu_records: Recording) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=next(iter(given)) if "to" not in given else "h:") as raised:
        insitu.attach(model, **{"to": insitu_records, **given})
    assert "\n" not in str(raised.value)
    assert type(model) is nn.Linear
    with insitu.attach(model, to=insitu_records):
        model(torch.ones(1, 2))
    assert len(insitu_records.rows("steps")) == 1


@pytest.mark.parametrize("given", NUMBERS, ids=str)
def test_start_says_it_too(given: dict[str, Any], insitu_records: Recording) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        insitu.start(to=insitu_records, **{"rank": 0, **given})


@pytest.mark.parametrize(("model", "said"), [(None, "None is no model"), (nn.Linear, "Linear is a class")])
def test_what_is_no_model_is_named(model: Any, said: str, insitu_records: Recording) -> None:
    with pytest.raises(ValueError, match=said):
        insitu.attach(model, to=insitu_records)


def test_a_run_that_is_none_is_named(insitu_records: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", "zz")
    with pytest.raises(ValueError, match="INSITU_RUN: 'zz' is no run; write 16 hex digits"):
        insitu.attach(nn.Linear(2, 2), to=insitu_records)


def test_a_file_is_no_store_and_the_remedy_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match="is a file; name a folder"):
        insitu.attach(nn.Linear(2, 2), to=f"file://{tmp_path / 'a'}")


@pytest.mark.parametrize(
    "numbers", [{"start": -1}, {"count": -1}, {"count": "a"}, {"sample_row": -2}], ids=lambda each: str(each)
)
def test_rows_that_cannot_be_are_refused_where_they_are_stated(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(numbers))):
        insitu.Rows("a", **{"start": 0, "count": 1, **numbers})


def test_a_session_says_what_it_cannot_use_and_goes_on(insitu_records: Recording) -> None:
    model = nn.Linear(2, 2)
    with insitu.attach(model, to=insitu_records) as session:
        wrong: Any = "abc"
        for call in (
            lambda: session.step(wrong),
            lambda: session.step(rows=wrong),
            lambda: session.step(rows=[wrong]),
            lambda: session.set_rules(wrong),
            lambda: session.event(wrong, wrong, step_id=wrong),
            lambda: session.event("k", 3),  # type: ignore[arg-type]
        ):
            with pytest.raises(ValueError, match=r"abc|texts"):
                call()
        model(torch.ones(1, 2))
        assert session.stats().probe_errors == 0
    assert [row["step_id"] for row in insitu_records.rows("steps")] == [0]
