"""Who may follow a collector's store, how many may, whose rows they are given, and what ends it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from access_kit import Rig, rig
from query_kit import RUN, Recorder, entry, source, step, verdict
from store_kit import run
from wait_kit import until

from insitu_collector.access.roles import Role
from insitu_collector.query.remote import RemoteStore
from insitu_collector.service import query_service
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store
from insitu_collector.tail import Tail

__all__ = ["rig"]  # a fixture
OF = {"epoch": 99, "rank": -1, "stage": -1}
FOLLOWED = ("sources", "steps", "verdicts", "gaps", "events")


@pytest.fixture
def recorder(rig: Rig) -> Iterator[Recorder]:
    made = Recorder(rig.folder / "store")
    begin(made, 7, "acme", RUN)
    yield made
    made.close()


def begin(recorder: Recorder, epoch: int, tenant: str, of_run: str) -> None:
    """Let a process of a tenant begin, take a step, and be judged."""
    recorder.write("sources", [source(epoch, tenant=tenant, run=of_run)])
    recorder.write("steps", [step(epoch, 1, [entry(f"{tenant}-request", 0, 1)])])
    recorder.write("verdicts", [verdict(OF["epoch"], f"{of_run[:8]}-x-1", tenant)])
    recorder.write("gaps", [{**OF, "reason": "corrupt", "source_epoch": epoch, "file": tenant}])


def refusal(tail: Tail) -> str:
    with pytest.raises(PermissionError) as error:
        tail.poll()
    return str(error.value)


def test_a_tenant_follows_its_own_processes_those_that_begin_later_too(rig: Rig, recorder: Recorder) -> None:
    token = rig.entry("r", Role.READ, tenant="acme")
    with rig.serving(recorder.path) as server, closing(RemoteStore(server.address, rig.with_token(token))) as store:
        tail = store.tail(FOLLOWED)
        begin(recorder, 8, "rival", "cd" * 8)
        first = tail.poll()
        assert {name: rows.num_rows for name, rows in first.items()} == dict.fromkeys(FOLLOWED[:4], 1)
        begin(recorder, 9, "rival", "ce" * 8)
        assert tail.poll() == {}
        begin(recorder, 10, "acme", "cf" * 8)
        recorder.write("steps", [step(8, 2, [entry("rival-request", 0, 1)])])
        second = tail.poll()
        assert second["sources"]["epoch"].to_pylist() == [10] == second["steps"]["epoch"].to_pylist()
        assert second["verdicts"]["text"].to_pylist() == ["acme"] == second["gaps"]["file"].to_pylist()
        assert "rival" not in repr([rows.to_pylist() for rows in (*first.values(), *second.values())])
        tail.close()


def test_a_tenant_follows_what_came_by_otlp_with_its_tokens_and_learns_nothing_of_others(
    rig: Rig, recorder: Recorder
) -> None:
    token = rig.entry("r", Role.READ, tenant="acme")
    begin(recorder, 8, "rival", "cd" * 8)
    recorder.write("logs", [log("acme"), log("rival"), log("acme")])
    recorder.write("requests", [{**OF, "epoch": 8, "request": "rival-request", "event": 0, "t_ns": 1}])
    recorder.seal()
    assert run("erase", recorder.path, "--request", "rival-request", "--yes").exit_code == 0
    with rig.serving(recorder.path) as server, closing(RemoteStore(server.address, rig.with_token(token))) as store:
        tail = store.tail(["logs", "requests"])
        assert tail.poll()["logs"]["tenant"].to_pylist() == ["acme", "acme"] and tail.hidden == {}
        recorder.write("logs", [log("rival")])
        assert tail.poll() == {}
        assert store.table("requests").num_rows == 0 and store.hidden == {}
        tail.close()
        folder = open_store(recorder.path)
        assert folder.table("requests").num_rows == 0 and folder.hidden == {("requests", 8): 1}, "it is still there"


def log(tenant: str) -> dict[str, Any]:
    return {**OF, "tenant": tenant, "unix_ns": 1}


def test_who_may_not_read_may_not_follow(rig: Rig, recorder: Recorder) -> None:
    shipper = rig.entry("s", Role.SHIP)
    with rig.serving(recorder.path) as server, closing(RemoteStore(server.address, rig.with_token(shipper))) as store:
        said = refusal(store.tail(FOLLOWED))
        assert "s has not the role read; add it to `roles`" in said and "\n" not in said


def test_a_token_that_is_taken_away_ends_it_and_a_new_one_in_the_same_file_goes_on(
    rig: Rig, recorder: Recorder
) -> None:
    rig.entry("stays", Role.READ)
    credentials = rig.with_token(rig.entry("old", Role.READ), "reader")
    with rig.serving(recorder.path) as server, closing(RemoteStore(server.address, credentials)) as store:
        tail = store.tail(["steps"])
        assert tail.poll()["steps"].num_rows == 1
        entries = [entry for entry in server.gate._entries if entry.name == "stays"]
        rig.replace_entries(*entries)

        def barred() -> str | None:
            try:
                assert tail.poll() == {}
            except PermissionError as error:
                return str(error)
            return None

        said = until(barred, "the collector to refuse")
        assert "the token is none of this collector's" in said and "INSITU_TOKEN_FILE" in said
        recorder.write("steps", [step(7, 2)])
        rig.token_file(rig.entry("new", Role.READ), "reader")

        def let_in() -> list[int] | None:
            try:
                return list(tail.poll()["steps"]["step_id"].to_pylist())
            except PermissionError:  # the collector has not looked at its file yet
                return None

        assert until(let_in, "the collector to know the new token") == [2]
        tail.close()


def test_more_than_there_are_places_for_are_told_and_whoever_leaves_makes_room(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    begin(recorder, 7, "", RUN)
    with CollectorServer(tmp_path, port=0, compact=False) as server, ExitStack() as tails:
        store = tails.enter_context(closing(RemoteStore(server.address)))
        for _ in range(query_service.MOST_FOLLOWERS):
            tails.enter_context(closing(tail := store.tail(["steps"]))).poll()
        other = tails.enter_context(closing(store.tail(["steps"])))
        with pytest.raises(ConnectionError, match=f"{query_service.MOST_FOLLOWERS} readers follow this store"):
            other.poll()
        assert store.table("steps").num_rows == 1, "questions have places of their own"
        tail.close()

        def place() -> bool:
            try:
                return bool(other.poll()["steps"].num_rows)
            except ConnectionError:
                return False

        until(place, "a place")
    recorder.close()


def test_a_collector_that_stops_does_not_wait_for_who_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("insitu_collector.service.server.STOP_S", 600.0)  # longer than a test may take
    server = CollectorServer(tmp_path, port=0, compact=False)
    store = RemoteStore(server.address)
    tail = store.tail(["steps"])
    assert tail.poll() == {}
    server.stop()
    with pytest.raises(ConnectionError, match="no collector answers"):
        tail.poll()
    store.close()
