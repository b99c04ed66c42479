"""What an erasure leaves: every row and every word that is not of who was erased, and nothing of who was."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import TABLES, schema_of
from insitu.segments.erasure import Erased, Erasure, Kind, digest, strings_in

SALT = b"0123456789abcdef"


def request(*names: str, traces: tuple[str, ...] = ()) -> Erased:
    hidden = tuple(digest(SALT, trace) for trace in traces)
    return Erased(SALT, [Erasure(Kind.REQUEST, digest(SALT, name), 0, 0, "me", traces=hidden) for name in names])


def rows(table: str, found: list[dict[str, Any]], epoch: int = 7) -> pa.RecordBatch:
    full = [{"epoch": epoch, "rank": 0, "stage": 0, "row_seq": n, **row} for n, row in enumerate(found)]
    return pa.RecordBatch.from_pylist(full, schema=schema_of(table))


NAMES = st.sampled_from(["a", "b", "c", "req-1", "req-10", "ü", ""])


@given(st.lists(st.one_of(st.none(), NAMES), max_size=30), st.sets(NAMES))
def test_rows_of_erased_requests_go_and_all_others_stay_in_order(drawn: list[str | None], erased: set[str]) -> None:
    data = rows("captures", [{"request": name, "data": b"x"} for name in drawn])
    left = request(*erased).left("captures", 7, data)
    assert left["request"].to_pylist() == [name for name in drawn if name not in erased]
    assert (left is data) == (left.num_rows == data.num_rows), "the same object where that is all of them"
    assert left.schema.equals(data.schema)


MAPS = st.one_of(st.none(), st.lists(st.tuples(NAMES, st.integers(0, 9)), max_size=5))


@given(st.lists(MAPS, max_size=12), st.sets(NAMES))
def test_steps_stay_and_lose_the_entries_of_erased_requests(drawn: list[Any], erased: set[str]) -> None:
    maps = [m if m is None else [{"request": name, "row": row, "count": 1} for name, row in m] for m in drawn]
    data = rows("steps", [{"step_id": n, "rows": entries} for n, entries in enumerate(maps)])
    left = request(*erased).left("steps", 7, data)
    left.validate(full=True)
    assert left["step_id"].to_pylist() == list(range(len(drawn)))
    found = [m if m is None else [(e["request"], e["row"]) for e in m] for m in left["rows"].to_pylist()]
    assert found == [m if m is None else [(name, row) for name, row in m if name not in erased] for m in drawn]


def test_a_slice_of_a_batch_is_read_as_what_it_is() -> None:
    maps = [[{"request": name, "row": 0}] for name in ("a", "b", "a", "c")]
    data = rows("steps", [{"step_id": n, "rows": m} for n, m in enumerate(maps)]).slice(1, 3)
    left = request("a").left("steps", 7, data)
    assert [[e["request"] for e in m] for m in left["rows"].to_pylist()] == [["b"], [], ["c"]]


def test_names_go_out_of_lists_and_sentences_and_the_rest_stays() -> None:
    text = "first NaN: rank 2, requests req-1, req-10 ...; (req-1) stage req-1."
    data = rows(
        "verdicts",
        [
            {"text": text, "remedy": "see req-1", "requests": ["req-1", "req-10"], "num_requests": 2},
            {"text": "the name req-1 in no list", "requests": []},
            {"text": "nobody", "requests": ["req-10"]},
        ],
    )
    left = request("req-1").left("verdicts", 7, data).to_pylist()
    assert left[0]["text"] == "first NaN: rank 2, requests (erased), req-10 ...; ((erased)) stage (erased)."
    assert (left[0]["remedy"], left[0]["requests"], left[0]["num_requests"]) == ("see (erased)", ["req-10"], 2)
    assert left[1]["text"] == "the name (erased) in no list"
    assert left[2] == data.to_pylist()[2]


def test_a_short_name_is_not_cut_out_of_words() -> None:
    data = rows("verdicts", [{"text": "stage a of a rank", "requests": ["a"]}])
    assert request("a").left("verdicts", 7, data)["text"].to_pylist() == ["stage (erased) of (erased) rank"]


@pytest.mark.parametrize("table", ["spans", "logs"])
def test_records_of_its_trace_go_and_those_that_name_it_inside(table: str) -> None:
    inside = b"\x0a\x09\x12\x07\x0a\x05req-1"  # a string, two messages deep
    data = rows(
        table,
        [
            {"trace_id": "t1"},
            {"trace_id": "t2", "otlp": inside},
            {"trace_id": "t3", "otlp": b"req-1"},
            {"trace_id": None},
        ],
    )
    erased = request("req-1", traces=("t1",))
    assert erased.left(table, 7, data)["trace_id"].to_pylist() == ["t2", "t3", None]
    assert erased.left(table, 7, data, deep=True)["trace_id"].to_pylist() == ["t3", None]


@pytest.mark.parametrize("table", TABLES)
def test_of_an_erased_process_nothing_is_left_in_any_table(table: str) -> None:
    erased = Erased(SALT, [Erasure(Kind.TENANT, digest(SALT, "acme"), 0, 0, "me", epochs=(7,))])
    assert erased.left(table, 7, rows(table, [{}, {}])).num_rows == 0
    of_others = rows(table, [{}], epoch=8)
    assert erased.left(table, 8, of_others) is of_others


def test_verdicts_of_the_runs_of_an_erased_tenant_go() -> None:
    erased = Erased(SALT, [Erasure(Kind.TENANT, digest(SALT, "acme"), 0, 0, "me", epochs=(7,), runs=("cafebabe",))])
    data = rows("verdicts", [{"verdict": "cafebabe-1"}, {"verdict": "deadbeef-1"}], epoch=9)
    assert erased.left("verdicts", 9, data)["verdict"].to_pylist() == ["deadbeef-1"]


def test_nothing_erased_is_nothing_looked_at() -> None:
    data = rows("captures", [{"request": "a"}])
    assert not Erased()
    assert Erased().left("captures", 7, data) is data


def test_a_digest_tells_neither_the_name_nor_that_two_stores_know_the_same() -> None:
    assert "req-1" not in digest(SALT, "req-1")
    assert digest(SALT, "req-1") == digest(SALT, "req-1") != digest(b"another", "req-1")


@given(st.binary(max_size=300))
def test_bytes_that_are_no_message_are_read_without_an_error(data: bytes) -> None:
    assert all(len(value) <= len(data) for value in strings_in(data))
