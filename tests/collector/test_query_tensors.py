"""Captured values: of one row, of a request, of tensor-parallel ranks together; in place where they can be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from query_kit import WIDTH, Recorder, capture, entry, site, source, step, value

from insitu.segments.layout import SEALED, SegmentName, first_free_number, list_segments
from insitu.segments.replacement import Replacement, origin, replace
from insitu.segments.whole import WholeSegment
from insitu_collector.query.asked import BadQuestion
from insitu_collector.query.payloads import Payloads, RowGone
from insitu_collector.query.pruning import Wanted
from insitu_collector.query.scan import Scan
from insitu_collector.query.tensors import SiteTensor
from insitu_collector.rows.selection import NothingFound
from insitu_collector.store import open_store


def maps_of(path: Path) -> list[tuple[int, int]]:
    """Return where this process has a file mapped, by the kernel's account."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(path) in line:
            begin, _, end = line.split(" ", 1)[0].partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def is_inside(array: Any, path: Path) -> bool:
    return any(begin <= array.ctypes.data and array.ctypes.data + array.nbytes <= end for begin, end in maps_of(path))


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    made = Recorder(tmp_path / "store")
    made.write("sources", [source(7)])
    made.write("sites", [site(7, 0, "L0.mlp_out"), site(7, 1, "L1.mlp_out")])
    made.write("steps", [step(7, 0, [entry("r", 0, 4), entry("other", 0, 1, 4)]), step(7, 1, [entry("r", 4, 1)])])
    made.write("captures", [capture(7, 0, at, "r", n) for at in (0, 1) for n in range(4)])
    made.write("captures", [capture(7, 1, at, "r", 4) for at in (0, 1)])
    return made


def test_a_row_of_captures_is_read_where_it_lies_and_stays_when_its_segment_goes(recorder: Recorder) -> None:
    recorder.close()
    store = open_store(recorder.path)
    row = store.captures(site="L1.*", request="r", steps=0).to_pylist()[2]
    (name,) = list_segments(recorder.path, SEALED, "captures")
    path = name.path(recorder.path, SEALED)
    found = store.tensor(row)
    assert found.dtype == np.float32 and found.shape == (WIDTH,)
    assert is_inside(found, path)
    path.unlink()  # it expires while the tensor is in use
    assert np.array_equal(found, value(1, 0, 2))
    found += 1  # a private copy of the page: nobody else sees it
    assert np.array_equal(found, value(1, 0, 2) + 1)


def test_rows_of_a_request_are_a_view_where_they_lie_together_and_copied_otherwise(recorder: Recorder) -> None:
    recorder.close()
    store = open_store(recorder.path)
    (name,) = list_segments(recorder.path, SEALED, "captures")
    together, apart = (store.tensors("r", "L1.*", steps=steps)["L1.mlp_out"] for steps in (0, None))
    for found, number in ((together, 4), (apart, 5)):
        assert found.positions.tolist() == list(range(number))
        assert np.array_equal(found.values, [value(1, int(n == 4), n) for n in range(number)])
        assert found.is_view == is_inside(found.values, name.path(recorder.path, SEALED)) == (number == 4)
        assert found.missing == {} and found.unlike == ()
    of_torch = store.tensors("r", "L1.*", steps=0, torch=True)["L1.mlp_out"]
    assert of_torch.is_view and of_torch.values.equal(torch.from_numpy(together.values))


def test_rows_of_an_open_segment_are_copied(recorder: Recorder) -> None:
    store = open_store(recorder.path)
    found = store.tensors("r")
    assert set(found) == {"L0.mlp_out", "L1.mlp_out"}
    assert not any(each.is_view for each in found.values())
    assert np.array_equal(found["L0.mlp_out"].values, [value(0, int(n == 4), n) for n in range(5)])
    recorder.close()
    assert np.array_equal(store.tensor(("r", "L0.mlp_out", range(1, 3))), [value(0, 0, 1), value(0, 0, 2)])
    assert np.array_equal(store.tensor(("r", "L0.mlp_out", 1)), [value(0, 1, 4)])


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "int32", "bool", "complex64"])
def test_every_type_is_what_was_captured(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    values = torch.linspace(-3, 3, 12).to(dtype).reshape(2, 6)
    raw = [row.contiguous().view(torch.uint8).numpy() for row in values]
    recorder = Recorder(tmp_path)
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "L0.mlp_out")])
    rows = [capture(7, 0, 0, "r", n, values=raw[n], dtype=name, shape=[6]) for n in range(2)]
    recorder.write("captures", rows)
    recorder.close()
    store = open_store(tmp_path)
    exact = store.tensor(("r", "L0.mlp_out"), torch=True)
    assert exact.dtype == dtype and torch.equal(exact.view(torch.uint8), values.view(torch.uint8))
    plain = store.tensor(store.captures().to_pylist()[1])
    expected = values[1].float() if name.startswith(("bfloat", "float8")) else values[1]
    assert np.array_equal(plain, expected.numpy())


def test_the_largest_values_come_with_their_places(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "logits", axis="samples")])
    top = [(np.array([9.5, 4.25], np.float32), np.array([700, 3], np.int32)) for _ in range(2)]
    raw = [np.frombuffer(values.tobytes() + places.tobytes(), np.uint8) for values, places in top]
    rows = [capture(7, n, 0, "r", n, values=raw[n], dtype="float32+int32", shape=[2]) for n in range(2)]
    recorder.write("captures", rows)
    recorder.close()
    found = open_store(tmp_path).tensors("r", "logits")["logits"]
    assert found.places is not None
    assert found.values.tolist() == [[9.5, 4.25]] * 2 and found.places.tolist() == [[700, 3]] * 2
    values, places = open_store(tmp_path).tensor(open_store(tmp_path).captures().to_pylist()[0])
    assert (values.tolist(), places.tolist()) == ([9.5, 4.25], [700, 3])


def test_what_is_missing_is_said_with_the_reason_and_nothing_is_guessed(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "L0.mlp_out"), site(7, 1, "logits", axis="samples")])
    maps = {0: entry("r", 3, 4, sample_row=-1), 1: entry("r", 7, 2, sample_row=0), 2: entry("r", 9, 1, sample_row=0)}
    recorder.write("steps", [step(7, number, [of], dropped=int(number == 2)) for number, of in maps.items()])
    recorder.write(
        "captures", [capture(7, 0, 0, "r", n) for n in (3, 5, 6)] + [capture(7, 1, 0, "r", n) for n in (7, 8)]
    )
    recorder.write("captures", [capture(7, 1, 1, "r", 8)])
    recorder.write("steps", [step(7, 3, [entry("r", 5, 1)])])  # preempted, and computed once more
    recorder.write("captures", [capture(7, 3, 0, "r", 5)])
    recorder.close()
    found = open_store(tmp_path).tensors("r")
    hidden, logits = found["L0.mlp_out"], found["logits"]
    assert hidden.positions.tolist() == [3, 5, 6, 7, 8]
    assert hidden.missing == {"not_computed": (0, 1, 2), "not_taken": (4,), "dropped": (9,)}
    assert np.array_equal(hidden.values[1], value(0, 3, 5)), "of the last step that computed it"
    assert logits.positions.tolist() == [8] and logits.missing == {"dropped": (9,)}


def test_a_row_that_is_not_there_is_one_line(recorder: Recorder) -> None:
    recorder.close()
    store = open_store(recorder.path)
    for ref, kind, says in (
        ({"epoch": 7, "row_seq": 99}, RowGone, "no captured row 99 of epoch 7; it was never stored, or has expired"),
        ({"row": 1}, BadQuestion, "known by its `epoch` and `row_seq`"),
        (("nobody", "L0.mlp_out"), NothingFound, "no captured row of request 'nobody' at L0.mlp_out"),
        (("r", "L*.mlp_out"), BadQuestion, r"means 2 sites here: L0.mlp_out, L1.mlp_out; tensors\(\) gives them all"),
        (("r",), BadQuestion, "names no rows"),
    ):
        with pytest.raises(kind, match=says):
            store.tensor(ref)


def test_a_request_of_two_replicas_is_asked_for_by_replica(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for replica in (0, 1):
        recorder.write("sources", [source(7 + replica, replica=replica)])
        recorder.write("sites", [site(7 + replica, 0, "L0.mlp_out")])
        recorder.write("captures", [capture(7 + replica, replica, 0, "r", 0)])
    recorder.close()
    store = open_store(tmp_path)
    with pytest.raises(BadQuestion, match=r"is in several replicas \(0, 1\); say which with replica="):
        store.tensors("r")
    assert np.array_equal(store.tensors("r", replica=1)["L0.mlp_out"].values, [value(0, 1, 0)])


# -- tensor-parallel ranks -------------------------------------------------------------------------------------------


def two_ranks(path: Path, shard: str, *, lost: tuple[int, int] | None = None, unlike: int = 0) -> Recorder:
    """Record two positions of a site that two ranks hold; lost: rank and position that is not stored."""
    recorder = Recorder(path)
    for rank in (0, 1):
        recorder.write("sources", [source(7 + rank, rank=rank, tp_rank=rank)])
        recorder.write("sites", [site(7 + rank, 0, "L0.attn_z", shard=shard)])
        rows = [
            capture(7 + rank, 0, 0, "r", n, rank=rank, tp_rank=rank * unlike) for n in range(2) if (rank, n) != lost
        ]
        recorder.write("captures", rows)
        recorder.write("steps", [step(7 + rank, 0, [entry("r", 0, 2)] if rank == 0 else None, rank=rank)])
    recorder.close()
    return recorder


@pytest.mark.parametrize("shard", ["head", "column"])
def test_columns_of_ranks_stand_side_by_side(tmp_path: Path, shard: str) -> None:
    two_ranks(tmp_path, shard, unlike=1)
    found = open_store(tmp_path).tensors("r")["L0.attn_z"]
    assert np.array_equal(found.values, [np.concatenate([value(0, 0, n), value(0, 0, n, 1)]) for n in range(2)])
    alone = open_store(tmp_path).tensors("r", rank=1)["L0.attn_z"]
    assert np.array_equal(alone.values, [value(0, 0, n, 1) for n in range(2)]) and alone.is_view


def test_a_position_that_lacks_a_rank_is_missing(tmp_path: Path) -> None:
    two_ranks(tmp_path, "column", lost=(1, 0))
    found = open_store(tmp_path).tensors("r")["L0.attn_z"]
    assert found.positions.tolist() == [1] and found.missing == {"part_missing": (0,)}
    assert found.values.shape == (1, 2 * WIDTH)


@pytest.mark.parametrize("unlike", [0, 1])
def test_what_all_ranks_hold_is_taken_once_and_compared(tmp_path: Path, unlike: int) -> None:
    two_ranks(tmp_path, "replicated", unlike=unlike)
    found = open_store(tmp_path).tensors("r")["L0.attn_z"]
    assert np.array_equal(found.values, [value(0, 0, n) for n in range(2)])
    assert found.unlike == ((0, 1) if unlike else ())
    two_ranks(tmp_path / "lost", "replicated", lost=(0, 1))
    of_one = open_store(tmp_path / "lost").tensors("r")["L0.attn_z"]
    assert of_one.positions.tolist() == [0, 1], "any rank's row will do"


@pytest.mark.parametrize(
    ("shard", "says"), [("partial", "is a partial sum on each of 2"), ("ring", "nobody knows how")]
)
def test_what_cannot_be_put_together_is_refused_with_the_reason(tmp_path: Path, shard: str, says: str) -> None:
    two_ranks(tmp_path, shard)
    with pytest.raises(BadQuestion, match=says):
        open_store(tmp_path).tensors("r")
    assert isinstance(open_store(tmp_path).tensors("r", rank=0)["L0.attn_z"], SiteTensor)


def test_a_reader_that_dies_leaves_nothing_and_one_whose_segments_are_removed_lives(recorder: Recorder) -> None:
    recorder.close()
    script = f"""
        import os, signal, sys
        from insitu_collector.store import open_store
        store = open_store({str(recorder.path)!r})
        found = store.tensors("r", "L0.*", steps=0)["L0.mlp_out"].values
        print("mapped", flush=True)
        sys.stdin.readline()
        print(float(found.sum()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == "mapped\n"
        for name in list_segments(recorder.path, SEALED):
            name.path(recorder.path, SEALED).unlink()
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert float(reader.stdout.readline()) == float(sum(value(0, 0, n).sum() for n in range(4)))
        assert reader.wait(60) == -signal.SIGKILL, "by its own hand, not for a page that was gone"
    assert not [name for name in os.listdir(recorder.path / "v1") if name.endswith(".lock")]


def test_a_row_whose_segment_is_merged_away_before_it_is_opened_is_found_in_the_other(recorder: Recorder) -> None:
    recorder.seal()
    recorder.write("captures", [capture(7, 2, 0, "r", 5)])
    recorder.close()

    class Meanwhile:
        """Has a turn between a listing and each opening."""

        def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
            merge_all(recorder.path, "captures")
            return True

    payloads = Payloads(recorder.path, Scan(recorder.path, lambda name, is_sealed: [], Meanwhile()))
    row, piece = payloads.row(7, 0)
    assert row["request"] == "r" and piece.read().tobytes() == value(0, 0, 0).tobytes()
    assert len(list_segments(recorder.path, SEALED, "captures")) == 1


def merge_all(path: Path, table: str) -> None:
    """Put one segment in the place of all that a table has, unless it is one."""
    names = list_segments(path, SEALED, table)
    if len(names) > 1:
        opened = [(name, WholeSegment(name.path(path, SEALED), table)) for name in names]
        what = Replacement(SegmentName(table, "a", first_free_number(path, "a")), names)
        batches = (batch for _, segment in opened for batch in segment.batches())
        replace(path, what, opened[0][1].schema, {**opened[0][1].metadata, **origin(opened)}, batches)
