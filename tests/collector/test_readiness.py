"""Ready means "can store durably": what takes that away is named, and it comes back by itself."""

from __future__ import annotations

import errno
import logging
import os

import pytest

from insitu.segments.layout import StoreFull
from insitu_collector.health.readiness import Readiness, State, Trouble


class Disk:
    """A disk that works, or fails with an error, when it is looked at and when it is written."""

    def __init__(self) -> None:
        self.at_look: int | None = None
        self.at_trial: int | None = None
        self.num_trials = 0

    def check(self) -> None:
        if self.at_look is not None:
            raise OSError(self.at_look, os.strerror(self.at_look))

    def trial(self) -> None:
        self.num_trials += 1
        if self.at_trial is not None:
            raise OSError(self.at_trial, os.strerror(self.at_trial))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def ready() -> Readiness:
    made = Readiness()
    made.started()
    return made


def test_it_is_ready_between_its_start_and_its_end() -> None:
    readiness, seen = Readiness(), list[State]()
    readiness.tell(seen.append)
    readiness.started()
    readiness.stopping()
    readiness.look(lambda: None, lambda: None)
    assert [state.trouble for state in seen] == [Trouble.STARTING, None, Trouble.STOPPING]
    assert [state.is_ready for state in seen] == [False, True, False]
    assert readiness.state.why_not == "it is being stopped"


@pytest.mark.parametrize(
    ("number", "trouble"),
    [
        (errno.ENOSPC, Trouble.DISK_FULL),
        (errno.EDQUOT, Trouble.DISK_FULL),
        (errno.EROFS, Trouble.READ_ONLY),
        (errno.EACCES, Trouble.NO_PERMISSION),
        (errno.EIO, Trouble.STORE_FAILED),
    ],
)
def test_an_error_is_named_and_over_once_a_file_can_be_written(
    ready: Readiness, disk: Disk, number: int, trouble: Trouble, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    ready.append_failed(OSError(number, os.strerror(number)))
    assert ready.state.trouble is trouble
    disk.at_trial = number
    ready.look(disk.check, disk.trial)
    assert ready.state.trouble is trouble
    disk.at_trial = None
    ready.look(disk.check, disk.trial)
    assert ready.state.is_ready
    assert [record.message for record in caplog.records] == [
        f"insitu: not ready: {State(trouble).why_not}",
        "insitu: ready again",
    ]


def test_a_look_alone_finds_trouble_and_a_healthy_disk_is_not_written_to(ready: Readiness, disk: Disk) -> None:
    ready.look(disk.check, disk.trial)
    disk.at_look = errno.EROFS
    ready.look(disk.check, disk.trial)
    assert ready.state.trouble is Trouble.READ_ONLY
    assert disk.num_trials == 0


def test_one_failed_sync_is_no_trouble_and_two_in_a_row_are(ready: Readiness, disk: Disk) -> None:
    for has_failed in (True, False, True):
        ready.synced(has_failed=has_failed)
        assert ready.state.is_ready
    ready.synced(has_failed=True)
    assert ready.state == State(Trouble.SYNC_FAILS)
    disk.at_trial = errno.EIO
    ready.look(disk.check, disk.trial)
    assert ready.state == State(Trouble.SYNC_FAILS), "an error that says less does not take its place"
    disk.at_look = errno.EROFS
    ready.look(disk.check, disk.trial)
    assert ready.state == State(Trouble.READ_ONLY)
    disk.at_look = disk.at_trial = None
    ready.look(disk.check, disk.trial)
    assert ready.state.is_ready
    ready.synced(has_failed=True)
    assert ready.state.is_ready, "it counts from the beginning"


def test_a_full_store_is_a_full_disk(ready: Readiness) -> None:
    ready.append_failed(StoreFull(errno.ENOSPC, "no room left for records"))
    assert ready.state.trouble is Trouble.DISK_FULL
    assert "make room there" in ready.state.why_not
