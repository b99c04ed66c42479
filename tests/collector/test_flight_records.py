"""Rows of `incidents` make one incident each, whoever wrote them; what is said of it is what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

import insitu
from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.records import schema_of
from insitu.testing import oracle_model
from insitu_collector.flight.command import incidents_in, stored_of
from insitu_collector.flight.records import incidents_of
from insitu_collector.store import open_store

T = 1_800_000_000 * 10**9
S = 10**9
SOURCES = pa.Table.from_pylist([{"epoch": epoch, "replica": 0} for epoch in (10, 11)], schema_of("sources"))


def row(state: str, epoch: int = 10, name: str = "aa", **more: Any) -> dict[str, Any]:
    told = {
        "epoch": epoch,
        "rank": epoch - 10,
        "stage": 0,
        "row_seq": 0,
        "incident": name,
        "state": state,
        "run": "ff",
        "reason": "nonfinite",
        "on_rank": 1,
        "on_stage": 1,
        "step_id": 412,
        "site": "L3.mlp_out",
        "trigger_unix_ns": T,
        "window_start_unix_ns": T - 10 * S,
        "window_end_unix_ns": T + 2 * S,
    }
    return told | more


def asked(*answered: bool) -> list[dict[str, Any]]:
    return [{"epoch": 10 + n, "replica": 0, "rank": n, "answered": is_there} for n, is_there in enumerate(answered)]


def held(epoch: int, **more: Any) -> dict[str, Any]:
    return row("answered", epoch, num_summaries=100, num_captures=30, since_unix_ns=T - 9 * S, **more)


def incidents(*rows: dict[str, Any]) -> list[Any]:
    return incidents_of(pa.Table.from_pylist(list(rows), schema_of("incidents")), SOURCES)


def test_rows_of_ranks_and_collector_are_one_incident() -> None:
    (found,) = incidents(held(11), row("opened", 11), row("closed", 7, asked=asked(True, True)), held(10))
    assert (found.asked, found.missing) == ([(0, 0), (0, 1)], [])
    assert [answer.rank for answer in found.answers] == [0, 1]
    assert found.sentence() == (
        "A value that is not finite at L3.mlp_out in step 412 on rank 1, stage 1. 60 rows and 200 canaries are kept, "
        "from 9.0 s before to 2.0 s after; 2 of 2 ranks answered."
    )


def test_a_rank_that_did_not_answer_is_named_and_a_late_answer_counts() -> None:
    closed = row("closed", 7, asked=asked(False, True))
    (found,) = incidents(row("opened", 11), closed, held(11))
    assert found.missing == [(0, 0)]
    assert found.sentence().endswith("; 1 of 2 ranks answered, rank 0 did not.")
    (late,) = incidents(row("opened", 11), closed, held(11), held(10))
    assert late.missing == []


def test_a_process_that_ended_first_kept_nothing_of_what_came_after() -> None:
    ended = held(10, window_end_unix_ns=T + S // 10)
    (found,) = incidents(row("opened", 11), ended)
    assert "from 9.0 s before to 0.1 s after" in found.sentence()
    (both,) = incidents(row("opened", 11), ended, held(11))
    assert "from 9.0 s before to 2.0 s after" in both.sentence()


def test_without_a_collector_nobody_is_called_missing() -> None:
    (found,) = incidents(row("opened"), held(10))
    assert (found.asked, found.missing) == (None, [])
    assert found.sentence().endswith("; of rank 0 alone: no collector asked the others.")


def test_an_incident_within_another_is_a_part_of_it() -> None:
    part = row("closed", 7, "bb", part_of="aa")
    found = incidents(row("opened", 10, "bb"), part, row("opened", 11), held(10, incident="bb"), held(11))
    assert [(incident.incident, incident.parts) for incident in found] == [("aa", ["bb"])]
    assert [incident.incident for incident in incidents(row("opened", 10, "bb"), part)] == ["bb"], "the whole was lost"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"reason": "exception", "text": "ValueError"}, "ValueError left the model in step 412 on rank 1, stage 1."),
        ({"reason": "signal", "text": "SIGUSR1", "step_id": None}, "SIGUSR1 came on rank 1, stage 1."),
        ({"reason": "asked", "text": "to see"}, "Asked for on rank 1, stage 1: to see."),
        ({"reason": "verdict", "text": "rank 1 is stuck."}, "rank 1 is stuck. "),
        ({"reason": "slow_step", "text": "90 ms"}, "A slow step 412 on rank 1, stage 1: 90 ms."),
        ({"reason": "later", "text": None}, "later."),
    ],
)
def test_each_reason_has_its_sentence(fields: dict[str, Any], text: str) -> None:
    (found,) = incidents(row("opened", **fields))
    assert found.sentence().startswith(text)
    assert "Nothing was held of it beyond what the store has anyway; nobody has answered yet." in found.sentence()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that one rank wrote by itself, with two incidents."""
    path = tmp_path_factory.mktemp("flight") / "store"
    model = oracle_model(num_layers=2, width=4)
    flight = insitu.Flight(rows="L*.mlp_out", post_s=0)
    with torch.no_grad(), insitu.attach(model, to=f"file://{path}", flight=flight) as session:
        for _ in range(5):
            model(torch.zeros(3, 4))
        session.dump("to see")
        session.flush()
        with pytest.raises(ValueError, match="rows of 4 values"):
            model(torch.zeros(3, 5))
    return path


def run(*arguments: str) -> tuple[int, str]:
    ran = CliRunner().invoke(command, ["incidents", *arguments])
    return ran.exit_code, ran.output


def test_the_command_lists_and_shows_what_a_process_kept(store: Path) -> None:
    first, second = incidents_in(open_store(store))
    assert (first.reason, second.reason) == ("asked", "exception")
    status, listed = run(str(store))
    assert status == ExitCode.OK
    assert [line.split()[0] for line in listed.splitlines()] == [first.incident, second.incident]
    status, shown = run(str(store), first.incident[:6])
    assert status == ExitCode.OK
    assert first.sentence() in shown
    assert "L1.mlp_out" in shown
    kept = [each for each in stored_of(open_store(store), first) if each.table == "captures"]
    assert [(each.site, each.num_rows) for each in kept] == [("L0.mlp_out", 12), ("L1.mlp_out", 12)]
    assert (kept[0].first_step_id, kept[0].last_step_id) == (1, 4)


def test_the_document_has_a_schema_and_all_there_is(store: Path) -> None:
    status, text = run(str(store), "--json")
    document = json.loads(text)
    assert (status, document["schema"], len(document["incidents"])) == (ExitCode.OK, "insitu.incidents/1", 2)
    one = json.loads(run(str(store), document["incidents"][0]["incident"], "--json")[1])
    assert one["incidents"] == document["incidents"][:1]
    assert one["incidents"][0]["asked"] is None
    assert {each["table"] for each in one["stored"]} == {"captures", "summaries"}


def test_what_is_not_there_is_one_line(store: Path, tmp_path: Path) -> None:
    status, text = run(str(store), "zz")
    assert (status, text.count("\n")) == (ExitCode.FAILURE, 1)
    assert "no incident 'zz'" in text
    assert run(str(tmp_path))[0] == ExitCode.FAILURE
    status, text = run(str(store), "--run", "zz")
    assert status == ExitCode.OK
    assert text.startswith("no incident in ")


def test_a_missing_rank_is_an_exit_status(tmp_path: Path) -> None:
    with insitu.start(to=f"file://{tmp_path}/store") as session:
        for each in (row("opened", 11), row("closed", 7, asked=asked(False, True))):
            session.append("incidents", {name: value for name, value in each.items() if name in _COLUMNS})
    status, text = run(f"{tmp_path}/store", "aa")
    assert status == ExitCode.PARTIAL
    assert "rank 0   of replica 0 has not answered" in text


_COLUMNS = set(schema_of("incidents").names[4:])
