"""Sending what a store holds once more: a window of time or dead letters, after live data, in bounded memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import grpc
import pyarrow as pa
import pytest
from click.testing import CliRunner
from feed_kit import BASE_NS, Writer, interval, source
from otlp_kit import attributes
from subscriber_kit import letters
from subscriber_kit import plain_environment as plain_environment
from subscriber_kit import receiver as receiver
from subscriber_kit import store as store
from target_kit import Receiver, Say, http_target

from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.exporters.base import Batch
from insitu.forwarding.cursor import Cursor
from insitu.records import schema_of
from insitu.segments.shard import Limits, ShardWriter
from insitu_collector.store import open_store
from insitu_collector.subscriber.account import Account
from insitu_collector.subscriber.backlog import backlog
from insitu_collector.subscriber.dead import DeadLetters
from insitu_collector.subscriber.delivery import Delivery
from insitu_collector.subscriber.ends import open_end
from insitu_collector.subscriber.mapping import TABLES
from insitu_collector.subscriber.opened import opened
from insitu_collector.subscriber.pace import Pace
from insitu_collector.subscriber.replay import Replay, Window
from insitu_collector.subscriber.target import parse_target

pytestmark = pytest.mark.matrix

HOUR_NS: Final = 3600 * 1_000_000_000


def replay(store: Path, to: str, *words: str, code: int = ExitCode.OK) -> dict[str, Any]:
    result = CliRunner().invoke(command, ["store", "replay", str(store), "--to", to, "--json", *words])
    assert result.exit_code == code, result.output
    return dict(json.loads(result.stdout))


def steps_of(receiver: Receiver) -> list[int]:
    return sorted(attributes(span)["insitu.step"] for span in receiver.spans())


@pytest.fixture
def ten_steps(store: Path) -> Path:
    """A store with a millisecond to each of ten steps, a step a batch; a site has an absmax of its step's number."""
    rank, writer = source(1), Writer(store)
    writer.rows(rank, "sources", rank.row())
    site = {"site": 0, "name": "L0.mlp_out", "layer": 0, "fqn": "m", "io": "out", "index": 0, "shard": "replicated"}
    writer.rows(rank, "sites", {**site, "axis": "tokens", "dtype": "float32"})
    for number in range(10):
        step = {"step_id": number, "mb": 0, "phase": 1, "t0_ns": number * 1_000_000, "num_rows": 3, "num_padded": 0}
        writer.rows(rank, "steps", {**step, "variant": 0, "dropped": 0, "rows": None})
        writer.rows(rank, "intervals", interval(number))
        row = {"step_id": number, "site": 0, "num_rows": 3, "canary": 1.0, "absmax": float(number)}
        writer.rows(rank, "summaries", {**row, "nonfinite_rows": []})
    writer.close()
    return store


def time_at(step: int) -> str:
    return str(BASE_NS + step * 1_000_000)


def test_a_window_is_sent_and_nothing_else(ten_steps: Path, receiver: Receiver) -> None:
    told = replay(ten_steps, receiver.url, "--from", time_at(3), "--until", time_at(6))
    assert steps_of(receiver) == [3, 4, 5]
    assert told["rows"] == 9
    (absmax,) = receiver.points("insitu.site.absmax")
    assert absmax.as_double == 5.0, "rows without a time go by their step"
    assert attributes(absmax)["insitu.site"] == "L0.mlp_out"
    assert receiver.points("insitu.steps")[-1].as_int == 3


def test_tables_that_are_not_named_stay(ten_steps: Path, receiver: Receiver) -> None:
    told = replay(ten_steps, receiver.url, "--tables", "summaries")
    assert (told["rows"], told["account"]["sent"]) == (10, {"metrics": 5})
    assert receiver.points("insitu.site.steps")[-1].as_int == 10


def test_a_dry_run_counts_what_a_run_sends(ten_steps: Path, receiver: Receiver) -> None:
    dry = replay(ten_steps, receiver.url, "--dry-run")
    assert receiver.num_asked == 0
    wet = replay(ten_steps, receiver.url)
    assert dry["account"] == wet["account"]
    assert wet["account"]["sent"]["traces"] == len(receiver.spans()) == 10


def test_a_replay_moves_no_cursor_and_has_the_ids_of_the_first_time(ten_steps: Path, receiver: Receiver) -> None:
    replay(ten_steps, receiver.url)
    replay(ten_steps, receiver.url)
    first, second = ([span.span_id for span in receiver.spans()][at : at + 10] for at in (0, 10))
    assert first == second
    assert not list(ten_steps.glob("v1/forward/*.json"))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--from", "yesterday"], "--from yesterday: write a time"),
        (["--from", "20", "--until", "10"], "--from is not before --until"),
        (["--tables", "captures"], "'captures' has no form in OTLP"),
        (["--dead", "--from", "10"], "--dead sends dead letters as they are"),
        (["--of", "http://h"], "add --dead"),
        (["--rate", "fast"], "--rate: 'fast' is no size"),
    ],
)
def test_what_cannot_be_meant_is_said_in_a_line(ten_steps: Path, words: list[str], why: str) -> None:
    result = CliRunner().invoke(command, ["store", "replay", str(ten_steps), "--to", "http://127.0.0.1:9", *words])
    assert result.exit_code == ExitCode.USAGE
    assert why in result.output


# -- dead letters ----------------------------------------------------------------------------------------------------


def test_dead_letters_go_once_they_are_taken_and_stay_where_they_are_not(ten_steps: Path, receiver: Receiver) -> None:
    receiver.choose = lambda signal, _: Say(400, grpc.StatusCode.INVALID_ARGUMENT) if signal == "traces" else Say()
    first = replay(ten_steps, receiver.url, code=ExitCode.PARTIAL)
    assert first["account"]["dead"] == {"traces": 10}
    again = replay(ten_steps, receiver.url, "--dead", code=ExitCode.PARTIAL)
    assert (again["letters"], again["account"]["dead"]) == (1, {"traces": 10})
    assert len(letters(ten_steps)) == 1, "refused again, it is a dead letter again"
    receiver.choose = lambda *_: Say()
    assert replay(ten_steps, receiver.url, "--dead")["account"]["sent"] == {"traces": 10}
    assert letters(ten_steps) == []
    assert steps_of(receiver) == list(range(10))


def test_dead_letters_of_another_destination_can_be_sent(ten_steps: Path, receiver: Receiver) -> None:
    with http_target() as wrong:
        wrong.choose = lambda *_: Say(404)
        replay(ten_steps, wrong.url, "--tables", "intervals", code=ExitCode.PARTIAL)
    assert replay(ten_steps, receiver.url, "--dead")["letters"] == 0
    assert replay(ten_steps, receiver.url, "--dead", "--of", wrong.url)["account"]["sent"]["traces"] == 10


def test_a_damaged_dead_letter_is_counted_and_named_and_the_others_are_sent(
    ten_steps: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.choose = lambda signal, _: Say(400, grpc.StatusCode.INVALID_ARGUMENT) if signal == "traces" else Say()
    replay(ten_steps, receiver.url, code=ExitCode.PARTIAL)
    ((path, _),) = letters(ten_steps)
    path.with_name("0-0-0.letter").write_bytes(b"{" + path.read_bytes())
    path.with_name("0-0-1.letter").write_bytes(path.read_bytes()[:-1])
    receiver.choose = lambda *_: Say()
    told = replay(ten_steps, receiver.url, "--dead", code=ExitCode.PARTIAL)
    assert (told["letters"], told["unreadable"], told["account"]["sent"]) == (1, 2, {"traces": 10})
    assert [line for line in caplog.messages if "0-0-" in line] == [
        f"insitu: dead letter {name} is not sent: {why}; `insitu store dead drop {ten_steps} {name}` removes it"
        for name, why in (
            ("0-0-0", "its first line is no head of a letter"),
            ("0-0-1", "its bytes are not those that were written"),
        )
    ]
    assert not path.exists() and path.with_name("0-0-0.letter").exists()


# -- an hour's backlog -----------------------------------------------------------------------------------------------


def waiter(then: Callable[[], object]) -> Callable[[float], bool]:
    """Return a wait in which something else happens."""

    def wait(_: float) -> bool:
        then()
        return False

    return wait


def test_row_27_live_data_goes_first(ten_steps: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []
    with opened(ten_steps, receiver.url, None, lambda _: False, lambda *_: None) as live:

        def look() -> None:
            order.append(f"live after {receiver.num_asked} requests")
            assert live.look(final=True)

        account, wait = Account(), waiter(look)
        with closing(open_end(parse_target(receiver.url, {}))) as end:
            delivery = Delivery(
                receiver.url,
                end,
                DeadLetters(ten_steps, receiver.url),
                account,
                pace=Pace(None),
                wait=wait,
                tell=lambda *_: None,
            )
            Replay(ten_steps, receiver.url, account, delivery, wait).rows(Window())
    assert order == ["live after 0 requests"], "it waited until the live subscriber had caught up, once"
    (said,) = [line for line in caplog.messages if "replay" in line]
    assert said.startswith(f"insitu: the replay waits: the subscriber of {receiver.url} goes first, and is ")
    assert backlog(ten_steps, Cursor(ten_steps, receiver.url), TABLES).num_rows == 0
    assert account.sent["traces"] == 10
    assert len(receiver.spans()) == 20


def write_backlog(store: Path, num_rows: int) -> None:
    """Write intervals of an hour of four ranks, as a collector would have left them: in batches and segments."""
    writer = ShardWriter(store, "collector", limits=Limits(max_bytes=1 << 20))
    ranks = [source(rank) for rank in range(1, 5)]
    for of in ranks:
        row = {**of.row(), "rank": of.rank, "stage": of.stage, "row_seq": 0}
        writer.append(Batch(of.epoch, 0, pa.RecordBatch.from_pylist([row], schema=schema_of("sources")), "sources"))
    each = num_rows // len(ranks)
    size = each // 120  # half a minute
    for first in range(0, each, size):
        for of in ranks:
            numbers = range(first, min(first + size, each))
            at = [number * HOUR_NS // each for number in numbers]
            columns = {
                "epoch": [of.epoch] * len(at),
                "rank": [of.rank] * len(at),
                "stage": [of.stage] * len(at),
                "row_seq": list(numbers),
                "t0_ns": at,
                "t1_ns": [t + 1000 for t in at],
                "cls": [4] * len(at),
                "step_id": list(numbers),
                "mb": [0] * len(at),
                "peer": [-1] * len(at),
                "bytes": [0] * len(at),
                "cpu_ns": [900] * len(at),
            }
            data = pa.RecordBatch.from_pydict(columns, schema=schema_of("intervals"))
            writer.append(Batch(of.epoch, first // size, data, "intervals"))
    writer.sync()
    writer.close()


SCRIPT: Final = """
import re, sys
from insitu.cli import main

try:
    main()
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print(f"peak {peak} KiB", file=sys.stderr)
"""


def replayed(store: Path, to: str, *words: str) -> tuple[dict[str, Any], float]:
    """Replay in a process of its own; return its document and the most memory it held, MiB."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, "store", "replay", str(store), "--to", to, "--json", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    peak = re.search(r"peak (\d+) KiB", ran.stderr)
    assert ran.returncode == 0, ran.stderr
    assert peak is not None, ran.stderr
    return dict(json.loads(ran.stdout)), int(peak[1]) / 1024


@pytest.mark.parametrize(
    ("few", "many"),
    [(10_000, 40_000), pytest.param(100_000, 600_000, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])],
)
def test_row_27_an_hours_backlog_is_sent_in_the_memory_of_a_short_one(tmp_path: Path, few: int, many: int) -> None:
    peaks = []
    for num_rows in (few, many):
        store = tmp_path / str(num_rows)
        write_backlog(store, num_rows)
        with http_target() as there:
            told, peak = replayed(store, there.url, "--rate", "none")
            assert (
                told["account"]["sent"]["traces"] == there.num_items() - told["account"]["sent"]["metrics"] == num_rows
            )
            assert told["rows"] == num_rows
            assert len(there.points("insitu.interval.time")) >= 4 * 59, "metrics of each minute, not of the hour"
        peaks.append(peak)
    assert peaks[1] < 400
    assert peaks[1] - peaks[0] < 64, peaks


def test_row_27_a_replay_keeps_to_its_rate(tmp_path: Path) -> None:
    store, rate = tmp_path / "store", 1 << 20
    write_backlog(store, 12_000)
    arrived: list[tuple[float, int]] = []
    lock = threading.Lock()

    def choose(_: str, request: Any) -> Say:
        with lock:
            arrived.append((time.monotonic(), request.ByteSize()))
        return Say()

    with http_target() as there:
        there.choose = choose
        told, _ = replayed(store, there.url, "--rate", "1MiB")
    num_bytes = sum(size for _, size in arrived)
    assert num_bytes == told["account"]["bytes"] > 2 * rate, "enough to be held up"
    taken_s = arrived[-1][0] - arrived[0][0]
    assert taken_s >= (num_bytes - arrived[-1][1] - rate) / rate - 0.1


def test_row_27_a_replay_takes_nothing_from_ingest(ten_steps: Path, receiver: Receiver) -> None:
    before = {path: path.stat().st_mtime_ns for path in ten_steps.rglob("*.arrow")}
    replay(ten_steps, receiver.url)
    assert {path: path.stat().st_mtime_ns for path in ten_steps.rglob("*.arrow")} == before
    assert open_store(ten_steps).table("health").num_rows == 0, "it writes no row of its own"
