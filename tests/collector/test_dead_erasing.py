"""What is erased goes from dead letters too: from its order on no replay sends it, and others keep theirs."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner
from feed_kit import Writer, interval, source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from otlp_in_kit import any_request, groups_of, normal, records_of, scopes_of, spans
from store_kit import batch, seal
from subscriber_kit import letters
from subscriber_kit import plain_environment as plain_environment
from subscriber_kit import store as store
from target_kit import Receiver, Say, http_target
from test_otlp_replay import replay
from test_passed_on import take
from test_subscriber import send
from wait_kit import until

from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.segments.erased_file import ErasedFile, ErasedUnreadable
from insitu.segments.erasure import Erased, Erasure, Kind, digest
from insitu.segments.layout import SEALED, list_segments
from insitu.segments.shard import ShardWriter
from insitu.vocabulary import RequestEvent
from insitu_collector.keeping.keeper import Keeper
from insitu_collector.keeping.letters import erase_letters
from insitu_collector.otlp.index import points_of
from insitu_collector.otlp.signals import LOGS, METRICS, TRACES, Signal
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.subscriber.dead import DeadLetters, read
from insitu_collector.subscriber.erased_items import left_of
from insitu_collector.subscriber.payloads import Payload, payload_of

TO: Final = "http://127.0.0.1:4318"
SECRET: Final = "patient-4711"
TRACE: Final = bytes.fromhex("00112233445566778899aabbccddeeff")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with http_target() as found:
        yield found


@pytest.fixture
def asked(store: Path) -> Path:
    """A store that knows a request and its trace, and dead letters of each signal that tell of it and of another."""
    requests = [
        {"request": name, "trace_id": trace, "event": int(RequestEvent.ARRIVED), "t_ns": 1}
        for name, trace in ((SECRET, TRACE.hex()), ("other", "f" * 32))
    ]
    seal(store, batch("requests", requests, seq=0, first=0))
    for signal, request in ((TRACES, some_spans()), (METRICS, some_metrics()), (LOGS, some_logs())):
        put(store, payload_of(signal.name, request.SerializeToString()), f"{SECRET}: no such field")
    return store


def some_spans() -> Any:
    """Return spans: of the trace, with the name, with a link to the trace, and two that say neither."""
    request = spans(5)
    of = records_of(scopes_of(groups_of(request)[0])[0])
    of[0].trace_id = TRACE
    of[1].attributes.add(key="insitu.request").value.string_value = SECRET
    of[2].links.add(trace_id=TRACE, span_id=b"12345678")
    return request


def some_metrics() -> Any:
    """Return a metric with a point for each request, one with an exemplar of the trace alone, and one more."""
    request = METRICS.request()
    scope = request.resource_metrics.add().scope_metrics.add()
    each = scope.metrics.add(name="tokens")
    for number, name in enumerate((SECRET, "other")):
        each.sum.data_points.add(as_int=number).attributes.add(key="request").value.string_value = name
    scope.metrics.add(name="traced").gauge.data_points.add(as_int=2).exemplars.add(trace_id=TRACE)
    scope.metrics.add(name="untraced").gauge.data_points.add(as_int=3)
    return request


def some_logs() -> Any:
    """Return log records: the name as a word of a sentence, as one of a list, and neither."""
    request = LOGS.request()
    scope = request.resource_logs.add().scope_logs.add()
    scope.log_records.add().body.string_value = f"requests {SECRET}, other waited for rank 1"
    listed = scope.log_records.add().attributes.add(key="requests").value.array_value
    listed.values.add().string_value = SECRET
    scope.log_records.add().body.string_value = f"requests {SECRET}0, other waited"
    return request


def put(store: Path, payload: Payload, text: str = "no") -> None:
    DeadLetters(store, TO).put(payload, "400", text)


def erase(store: Path, *words: str) -> dict[str, Any]:
    result = CliRunner().invoke(command, ["store", "erase", str(store), *words, "--json"])
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def left_in(store: Path) -> dict[str, list[str]]:
    """Return what the letters of a store still tell, by signal: names of spans and metrics, bodies of logs."""
    found: dict[str, list[str]] = {}
    for path, _ in letters(store):
        letter, payload = read(store, path)
        request = {"traces": TRACES, "metrics": METRICS, "logs": LOGS}[letter.signal].request.FromString(payload.body)
        records = [record for group in groups_of(request) for scope in scopes_of(group) for record in records_of(scope)]
        names = [record.body.string_value if letter.signal == "logs" else record.name for record in records]
        found[letter.signal] = found.get(letter.signal, []) + names
    return found


def holds(store: Path) -> list[str]:
    """Return the dead letters and what lies beside them that have the name or the trace in them."""
    files = [path for path in (store / "v1/dead").rglob("*") if path.is_file()]
    return [path.name for path in files if SECRET.encode() + b'"' in (data := path.read_bytes()) or TRACE in data]


LEFT: Final = {
    "traces": ["span 3", "span 4"],
    "metrics": ["tokens", "untraced"],
    "logs": [f"requests {SECRET}0, other waited"],
}


def test_without_yes_it_is_said_how_much_would_go_and_nothing_does(asked: Path) -> None:
    before = {path: path.read_bytes() for path in asked.rglob("*.letter")}
    assert erase(asked, "--request", SECRET)["dead_letter_items"] == 7
    assert {path: path.read_bytes() for path in asked.rglob("*.letter")} == before


def test_of_a_request_each_item_goes_that_names_it_or_its_trace_and_no_other(asked: Path) -> None:
    assert erase(asked, "--request", SECRET, "--yes")["dead_letter_items"] == 7
    assert left_in(asked) == LEFT
    assert holds(asked) == [], "the bytes are gone when it returns"
    assert {letter.text for _, letter in letters(asked)} == {"(erased): no such field"}
    assert [letter.num_items for _, letter in letters(asked)] == [2, 2, 1]
    assert erase(asked, "--request", SECRET, "--yes")["dead_letter_items"] == 0
    kept = spans(5).resource_spans[0].scope_spans[0].spans[3:]
    (traces,) = (read(asked, path)[1] for path, letter in letters(asked) if letter.signal == "traces")
    again = TRACES.request.FromString(traces.body)
    assert list(again.resource_spans[0].scope_spans[0].spans) == list(kept)
    assert again.resource_spans[0].resource == spans(1).resource_spans[0].resource


def test_a_replay_sends_what_is_left(asked: Path, receiver: Receiver) -> None:
    erase(asked, "--request", SECRET, "--yes")
    told = replay(asked, receiver.url, "--dead", "--of", TO)
    assert (told["letters"], told["account"]["sent"]) == (3, {"traces": 2, "metrics": 2, "logs": 1})
    assert [span.name for span in receiver.spans()] == LEFT["traces"]
    bodies = b"".join(got.body for signal in LEFT for got in receiver.got(signal))
    assert TRACE not in bodies and f"{SECRET}," not in bodies.decode(errors="replace")
    assert letters(asked) == []


def test_an_order_whose_command_was_killed_hides_at_once_and_the_next_compaction_removes(
    asked: Path, receiver: Receiver
) -> None:
    order_alone(asked)
    assert holds(asked), "the bytes are there"
    assert left_in(asked) == LEFT
    assert SECRET not in run("dead", "ls", asked)
    told = replay(asked, receiver.url, "--dead", "--of", TO, "--dry-run")
    assert told["account"]["sent"] == {"traces": 2, "metrics": 2, "logs": 1}


def order_alone(store: Path, due_unix_ns: int = 1) -> None:
    """Write an order down and do nothing else, as a command that is killed then."""
    file = ErasedFile(store)
    salt = file.salt()
    file.add(Erasure(Kind.REQUEST, digest(salt, SECRET), 0, due_unix_ns, "", (digest(salt, TRACE.hex()),)))


def run(*words: Any, code: int = ExitCode.OK) -> str:
    result = CliRunner().invoke(command, ["store", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_what_is_overdue_is_named_until_it_is_compacted(asked: Path) -> None:
    order_alone(asked)
    told = run("verify", asked, code=ExitCode.PROBLEMS_FOUND)
    assert all(path.name in told for path in asked.rglob("*.letter"))
    run("compact", asked)
    assert holds(asked) == [] and left_in(asked) == LEFT
    run("verify", asked)


def test_a_running_collector_takes_it_out_by_itself(asked: Path) -> None:
    order_alone(asked)
    ingest = Ingest(ShardWriter(asked, SHARD))
    keeper = Keeper(ingest._writer, ingest, ingest.commit)
    keeper.look()
    ingest.close()
    assert holds(asked) == [] and left_in(asked) == LEFT


def test_a_letter_that_was_damaged_since_an_order_is_listed_as_such_and_can_be_dropped(asked: Path) -> None:
    erase(asked, "--request", SECRET, "--yes")
    ((path, letter), *others) = letters(asked)
    path.write_bytes(path.read_bytes()[:-1])
    told = CliRunner().invoke(command, ["store", "dead", "ls", str(asked)]).stdout.splitlines()
    assert [line.split()[1] == "damaged" for line in told] == [True] + [False] * len(others)
    assert CliRunner().invoke(command, ["store", "dead", "drop", str(asked), letter.name]).exit_code == 0
    assert not path.exists() and letters(asked) == others


def test_what_was_on_its_way_when_it_was_erased_becomes_no_letter(asked: Path) -> None:
    dead = DeadLetters(asked, TO)
    erase(asked, "--request", SECRET, "--yes")
    dead.put(payload_of("traces", some_spans().SerializeToString()), "400", f"of {SECRET}")
    assert holds(asked) == [] and left_in(asked)["traces"] == LEFT["traces"] * 2
    only = spans(1)
    only.resource_spans[0].scope_spans[0].spans[0].trace_id = TRACE
    num_letters = len(letters(asked))
    dead.put(payload_of("traces", only.SerializeToString()), "400", "")
    assert len(letters(asked)) == num_letters


def test_a_letter_that_waits_for_its_turn_while_an_order_is_given_is_put_without_it(asked: Path) -> None:
    ((path, _), *_) = letters(asked)
    with (path.parent / "lock").open("w") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inode = os.fstat(lock.fileno()).st_ino
        putting = pool.submit(put, asked, payload_of("traces", some_spans().SerializeToString()))
        waits = re.compile(rf"-> FLOCK .*:{inode} ")
        until(lambda: waits.search(Path("/proc/locks").read_text()), "it to wait for the folder")
        order_alone(asked)
        fcntl.flock(lock, fcntl.LOCK_UN)
        putting.result(30)
    assert erase_letters(asked, ErasedFile(asked).read()) == 7, "of the three that were there"
    assert left_in(asked)["traces"] == LEFT["traces"] * 2


def test_while_it_cannot_be_told_what_is_erased_no_letter_is_shown_or_kept(asked: Path) -> None:
    ((path, _), *_) = letters(asked)
    dead, file = DeadLetters(asked, TO), ErasedFile(asked).path
    file.write_text("{")
    for look in (lambda: letters(asked), lambda: read(asked, path), lambda: dead.put(a_span(), "400", "")):
        with pytest.raises(ErasedUnreadable, match="restore that file"):
            look()
    file.unlink()
    assert len(letters(asked)) == 3


def a_span() -> Payload:
    return payload_of("traces", spans(1).SerializeToString())


def test_what_cannot_be_read_and_what_a_dead_writer_left_goes_with_any_order(asked: Path) -> None:
    ((path, _), *_) = letters(asked)
    damaged = path.with_name("0-0-0.letter")
    damaged.write_bytes(path.read_bytes()[:-1])
    draft = path.with_suffix(".draft")
    draft.write_bytes(path.read_bytes())
    erase(asked, "--request", SECRET, "--yes")
    assert not damaged.exists() and not draft.exists()
    put(asked, Payload("traces", b"\x0a\xff", 1))
    assert left_in(asked) == LEFT, "nobody can tell what it holds"


# -- tenants ---------------------------------------------------------------------------------------------------------


def fill_dead(store: Path, receiver: Receiver) -> None:
    """Have a receiver refuse all that a store has."""
    receiver.choose = lambda *_: Say(400)
    send(store, receiver.url)
    receiver.choose = lambda *_: Say()


def test_of_a_tenant_all_goes_that_it_had_sent_by_otlp_and_what_others_sent_stays(
    store: Path, receiver: Receiver
) -> None:
    take(
        store,
        *(
            (spans(2, seed=seed, service=f"of-{tenant}").SerializeToString(), tenant)
            for seed, tenant in enumerate("aba")
        ),
        (spans(1, seed=9, service="of-nobody").SerializeToString(), ""),
    )
    fill_dead(store, receiver)
    assert [letter.num_items for _, letter in letters(store)] == [2, 2, 2, 1]
    listed = json.loads(run("dead", "ls", store, "--json"))["letters"]
    assert [each["of"]["tenant"] for each in listed] == ["a", "b", "a", None]
    assert erase(store, "--tenant", "a", "--yes")["dead_letter_items"] == 4
    assert not [path for path in store.rglob("*.letter") if b"of-a" in path.read_bytes()]
    replay(store, receiver.url, "--dead")
    sent = [normal(got.request) for got in receiver.got("traces")]
    assert sent == [normal(spans(2, seed=1, service="of-b")), normal(spans(1, seed=9, service="of-nobody"))]


def test_what_the_tenant_sends_later_is_new(store: Path, receiver: Receiver) -> None:
    take(store, (spans(2, seed=1).SerializeToString(), "a"))
    fill_dead(store, receiver)
    erase(store, "--tenant", "a", "--yes")
    assert letters(store) == []
    take(store, (spans(3, seed=2).SerializeToString(), "a"))
    fill_dead(store, receiver)
    assert [letter.num_items for _, letter in letters(store) if letter.signal == "traces"] == [3]


def test_a_tenant_is_found_by_its_letters_where_its_rows_have_expired(store: Path, receiver: Receiver) -> None:
    take(store, (spans(2, seed=1).SerializeToString(), "a"), (spans(1, seed=2).SerializeToString(), "b"))
    fill_dead(store, receiver)
    for name in list_segments(store, SEALED, "spans"):
        name.path(store, SEALED).unlink()
    assert erase(store, "--tenant", "a", "--yes")["dead_letter_items"] == 2
    assert [letter.num_items for _, letter in letters(store)] == [1]


def test_of_a_tenant_what_its_processes_recorded_goes_and_verdicts_of_its_runs(store: Path, receiver: Receiver) -> None:
    writer, judge = Writer(store), source(9, run="", role="client", rank=-1, stage=-1)
    for epoch, tenant, run in ((1, "a", "aaaa" * 4), (2, "b", "bbbb" * 4)):
        rank = source(epoch, run=run)
        writer.rows(rank, "sources", rank.row() | {"tenant": tenant})
        writer.rows(rank, "intervals", *(interval(step) for step in range(epoch + 1)))
    writer.rows(judge, "sources", judge.row())
    for verdict in ("aaaaaaaa-1", "bbbbbbbb-1"):
        row = {"verdict": verdict, "revision": 1, "kind": "healthy", "state": "open", "text": f"all is well: {verdict}"}
        writer.rows(judge, "verdicts", row | {"window_end_unix_ns": 5, "window_start_unix_ns": 1})
    writer.close()
    fill_dead(store, receiver)
    assert sum(letter.num_items for _, letter in letters(store) if letter.signal == "traces") == 5
    erase(store, "--tenant", "a", "--yes")
    left = b"".join(path.read_bytes() for path in store.rglob("*.letter"))
    assert b"aaaaaaaa" not in left and b"all is well: bbbbbbbb-1" in left
    assert sum(letter.num_items for _, letter in letters(store) if letter.signal == "traces") == 3
    assert {letter.signal for _, letter in letters(store)} == {"traces", "metrics", "logs"}


def test_where_processes_cannot_be_told_apart_all_of_ours_goes_and_nobody_elses(
    store: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=the one")
    writer = Writer(store)
    for epoch, tenant in ((1, "a"), (2, "b")):
        rank = source(epoch)
        writer.rows(rank, "sources", rank.row() | {"tenant": tenant})
        writer.rows(rank, "intervals", interval(epoch))
    writer.close()
    fill_dead(store, receiver)
    put(store, a_span())
    erase(store, "--tenant", "a", "--yes")
    assert left_in(store) == {"traces": ["span 0"]}


# -- any request -----------------------------------------------------------------------------------------------------


def items_in(signal: Signal, request: Any) -> list[bytes]:
    """Return the bytes of each item, in order."""
    found = []
    for group in groups_of(request):
        for scope in scopes_of(group):
            for record in records_of(scope):
                points = list(points_of(record)) if signal is METRICS else []
                found += [normal(each) for each in points or [record]]
    return found


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(any_request(), st.data())
def test_of_any_request_just_the_items_go_that_were_given_the_name(
    sent: tuple[Signal, Any], data: st.DataObject
) -> None:
    signal, request = sent
    salt = b"salt"
    erased = Erased(salt, [Erasure(Kind.REQUEST, digest(salt, SECRET), 0, 0, "", (digest(salt, TRACE.hex()),))])
    expected = []
    for group in groups_of(request):
        for scope in scopes_of(group):
            for record in records_of(scope):
                for each in (list(points_of(record)) if signal is METRICS else []) or [record]:
                    is_item = signal is not METRICS or each is not record
                    if is_item and data.draw(st.booleans()):
                        each.attributes.add(key="x").value.array_value.values.add().string_value = SECRET
                        continue
                    expected.append(normal(each))
    before = payload_of(signal.name, request.SerializeToString())
    left = left_of(before, erased)
    assert left.num_items == len(expected)
    assert items_in(signal, signal.request.FromString(left.body)) == expected
    assert (left is before) == (left.num_items == before.num_items)
