"""Steps of few rows share a slab, none writes over another that is not read, and what was read is free again."""

from __future__ import annotations

import resource
import threading
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.row_forms import RowForm
from insitu.session.step import StepRecord
from insitu.slabs.rows import RowSlabs
from insitu.taps.observer import Observer
from insitu.testing import Recording

MAX_ROWS, NUM_SLABS = 8, 3
FORM = RowForm(1, "float32")
SIZES = st.one_of(st.integers(1, MAX_ROWS), st.none())


def slabs() -> RowSlabs:
    """Return a ring of three."""
    found = RowSlabs({0: FORM}, MAX_ROWS, torch.device("cpu"), NUM_SLABS * (MAX_ROWS + 1) * FORM.num_bytes)
    assert found.ring.size == NUM_SLABS
    return found


@given(st.lists(st.one_of(st.tuples(st.just("take"), SIZES), st.tuples(st.just("read"), st.integers(1, 5)))))
def test_a_step_has_its_places_to_itself_until_it_is_read(does: list[tuple[str, int | None]]) -> None:
    ring, unread = slabs(), deque[set[tuple[int, int]]]()
    for what, num in does:
        if what == "read":
            num_read = min(len(unread), num or 0)
            for _ in range(num_read):
                unread.popleft()
            ring.free(num_read)
            continue
        taken = ring.take(num)
        if taken is None:
            assert len(unread) >= NUM_SLABS - 1, "a slab that holds nothing is free"
            continue
        slab, first = taken
        places = {(slab, first + at) for at in range(MAX_ROWS if num is None else num)}
        assert all(0 <= place < MAX_ROWS for _, place in places)
        assert not any(places & others for others in unread)
        unread.append(places)
    ring.free(len(unread))
    assert ring.ring.num_taken <= 1, "but for the slab that takes steps now"
    assert ring.take(None) is not None


def test_steps_of_one_row_fill_every_place() -> None:
    ring = slabs()
    taken = [ring.take(1) for _ in range(NUM_SLABS * MAX_ROWS)]
    assert taken == [(slab, place) for slab in range(NUM_SLABS) for place in range(MAX_ROWS)]
    assert ring.take(1) is None
    ring.free(MAX_ROWS - 1)
    assert ring.take(1) is None, "one of them is not read yet"
    ring.free(1)
    assert ring.take(1) == (0, 0)


def test_a_child_begins_with_all_slabs() -> None:
    ring = slabs()
    while ring.take(3) is not None:
        pass
    ring.start_over()
    taken = [ring.take(None) for _ in range(NUM_SLABS)]
    assert {slab for slab, _ in filter(None, taken)} == set(range(NUM_SLABS))
    ring.free(NUM_SLABS)
    assert ring.take(None) is not None


class Gate:
    """A device's event that comes when it is let."""

    def __init__(self, is_open: threading.Event) -> None:
        self.query = is_open.is_set


@pytest.mark.parametrize("mode", [None, "eager"])
def test_many_small_steps_are_kept_before_the_drain_looks(
    mode: str | None, insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slabs of 2,048 rows and forty steps of three: as many as there are slabs would be two."""
    is_open, end = threading.Event(), Observer.end

    def later(self: Observer, record: StepRecord) -> None:
        end(self, record)
        record.ready = Gate(is_open)

    monkeypatch.setattr(Observer, "end", later)
    net, num_steps, outputs = nn.Linear(2, 4096).eval(), 40, []
    rules = [insitu.Rule(sites="output", requests="opt-in")]
    with torch.inference_mode(), insitu.attach(net, to=insitu_records, rules=rules) as session:
        called = net if mode is None else torch.compile(net, backend=mode, fullgraph=True)
        for step in range(num_steps):
            rows = [insitu.Rows(f"r{step}", start=1, count=3, position=7, capture=True)]
            with session.step(step, rows=rows):
                outputs.append(called(torch.full((5, 2), float(step)) + torch.arange(5.0)[:, None]).numpy())
        assert session._observer is not None and session._observer.row_slabs is not None
        assert session._observer.row_slabs.ring.size == 2
        is_open.set()
        session.flush()
    assert session.stats().dropped == {}
    found = insitu_records.rows("captures")
    assert [(row["step_id"], row["request"], row["row"], row["position"]) for row in found] == [
        (step, f"r{step}", 1 + at, 7 + at) for step in range(1, num_steps) for at in range(3)
    ]
    for row in found:
        assert np.array_equal(np.frombuffer(row["data"], np.float32), outputs[row["step_id"]][row["row"]])


class Wide(nn.Module):
    """Returns rows of very many values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(2, 300_000)


def say_available(root: Path, num_kib: int) -> None:
    """Be a machine with so much memory available, without limits."""
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 9999999999 kB\nMemAvailable: {num_kib} kB\n")


def rowless(recording: Recording, caplog: pytest.LogCaptureFixture) -> str:
    """Run a model whose rows find no memory, in three steps of which the first takes none; return what the log says."""
    rules = [insitu.Rule(sites="0", requests="all")]
    model, x = nn.Sequential(Wide(), nn.Identity()), torch.ones(2, 1)
    with torch.inference_mode(), insitu.attach(model, to=recording, rules=rules, max_rows=2048) as session:
        for _ in range(3):
            assert model(x).shape == (2, 300_000)
        assert session.stats().probe_errors == 0
    assert [row["canary"] for row in recording.rows("summaries")] == [600_000.0] * 3
    assert not recording.rows("captures")
    assert session.stats().dropped == {"captures": {"slab_full": 4}}
    assert session.stats().produced["captures"] == 4
    (said,) = [record.getMessage() for record in caplog.records if "no rows" in record.getMessage()]
    return said


def test_rows_that_would_take_most_of_the_memory_are_left_off_and_it_is_said(
    insitu_records: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("insitu.slabs.memory.ROOT", tmp_path)
    say_available(tmp_path, 4194304)
    said = rowless(insitu_records, caplog)
    assert "would take 4689 MiB of memory, and may take 2048; name fewer sites" in said


def test_rows_that_would_take_most_of_what_a_container_has_left_are_left_off_too(
    insitu_records: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("insitu.slabs.memory.ROOT", tmp_path)
    say_available(tmp_path, 64 << 20)
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": f"{4 << 30}", "sys/fs/cgroup/memory.current": "0"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    said = rowless(insitu_records, caplog)
    assert "would take 4689 MiB of memory, and may take 2048; name fewer sites" in said


def test_rows_for_which_no_memory_is_given_are_left_off_too(
    insitu_records: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("insitu.slabs.memory.ROOT", tmp_path / "away")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), limits[1]))
    try:
        said = rowless(insitu_records, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "there are no 4689 MiB of memory for two steps" in said


def test_only_rows_that_were_due_are_counted_where_there_is_no_memory(
    insitu_records: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked by name, of the rows that the tensor has; not what a rule leaves out, nor what the recorder holds."""
    monkeypatch.setattr("insitu.slabs.memory.ROOT", tmp_path)
    say_available(tmp_path, 65536)
    rules = [insitu.Rule(sites="1", rows="last"), insitu.Rule(sites="output")]
    model, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.ones(6, 4096)
    flight = insitu.Flight(rows="0")
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules, flight=flight) as session:
        for step in range(4):
            rows = [
                insitu.Rows("asks", start=0, count=3, capture=True),
                insitu.Rows("silent", start=3, count=1),
                insitu.Rows("beyond", start=5, count=2, capture=step == 3),
            ]
            with session.step(step, rows=rows):
                model(x)
    assert not insitu_records.rows("captures")
    asked_by_name, of_two_one_is_there = 3 * (1 + 3), 1
    assert session.stats().dropped == {"captures": {"slab_full": asked_by_name + of_two_one_is_there}}


def test_rows_of_a_late_site_that_finds_no_memory_are_counted_and_the_others_kept(
    insitu_records: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rare = nn.Identity(), nn.Identity()

        def forward(self, x: torch.Tensor, is_rare: bool) -> torch.Tensor:
            x = self.often(x)
            return self.rare(x) if is_rare else x

    monkeypatch.setattr("insitu.slabs.memory.ROOT", tmp_path)
    say_available(tmp_path, 4194304)
    rules = [insitu.Rule(sites=name, requests="all") for name in ("often", "rare")]
    model = Branching()
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules) as session:
        for step in range(6):
            with session.step(step, rows=[insitu.Rows("a", start=0, count=2)]):
                model(torch.ones(2, 256), step >= 3)
            say_available(tmp_path, 1024)
            session.flush()
    assert [row["step_id"] for row in insitu_records.rows("captures")] == [step for step in range(1, 6) for _ in "ab"]
    assert session.stats().dropped == {"captures": {"slab_full": 3 * 2}}, (
        "of the step it fired first in and those after"
    )
    (said,) = [record.getMessage() for record in caplog.records if "no rows" in record.getMessage()]
    assert "no rows are taken of 1 sites" in said


def test_rules_set_while_there_is_no_memory_say_it_once_and_count(
    insitu_records: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("insitu.slabs.memory.ROOT", tmp_path)
    say_available(tmp_path, 4194304)
    model = nn.Sequential(nn.Identity())
    with torch.inference_mode(), insitu.attach(model, to=insitu_records) as session:
        model(torch.ones(3, 256))
        say_available(tmp_path, 1024)
        session.set_rules([insitu.Rule(sites="0", requests="all")])
        model(torch.ones(3, 256))
    assert session.stats().dropped == {"captures": {"slab_full": 3}}
    assert len([record for record in caplog.records if "no rows" in record.getMessage()]) == 1


@pytest.mark.parametrize("max_rows", [10**12, 2**62])
def test_more_rows_than_there_is_memory_for_are_refused_at_once(max_rows: int, insitu_records: Recording) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"max_rows: .* would take .* MiB of memory, and may take") as raised:
        insitu.attach(model, to=insitu_records, max_rows=max_rows)
    assert "\n" not in str(raised.value)
    assert "forward" not in vars(model)
