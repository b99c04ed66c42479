"""`insitu stalls`: verdicts and the ledger of a store, for people and as JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from replica_kit import of_engines

from insitu.records import schema_of
from insitu_collector.judge.command import judge
from insitu_collector.judge.runs import final_verdicts
from insitu_collector.keeping.command import store as store_commands
from insitu_collector.ledger.words import BAR
from insitu_collector.simulate import RUN, Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store
from insitu_collector.views.stalls import stalls, stalls_of, traffic_window


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return simulate(Scenario(seed=5, seconds=10.0, faults=(Fault("slow", 4.0, 1, ms=15.0),)))


@pytest.fixture(scope="module")
def store(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stalls") / "store"
    write_store(tables, str(path))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(stalls, [str(argument) for argument in arguments])


def test_the_document_holds_verdicts_and_a_ledger_that_sums_to_its_window(store: Path) -> None:
    found = run(store, "--json")
    assert found.exit_code == 0
    answer: dict[str, Any] = json.loads(found.stdout)
    assert answer["schema"] == "insitu.stalls/1"
    assert [(v["kind"], v["stage"], v["rank"], v["state"]) for v in answer["verdicts"]] == [
        ("stage_limits", 1, 1, "open")
    ]
    begin, end = answer["ledger_window_unix_ns"]
    sums: defaultdict[int, float] = defaultdict(float)
    for row in answer["ledger"]:
        sums[row["rank"]] += row["seconds"]
    assert dict(sums) == pytest.approx({0: (end - begin) / 1e9, 1: (end - begin) / 1e9})
    assert answer["overlap_ns"] == answer["unattributed_ns"] == {"0": 0, "1": 0}
    waited = [each["waited_share"] for each in answer["bubble"]]
    assert waited[0] > 0.3 > waited[1], "stage 1 is slow, so stage 0 waits"
    for each in answer["bubble"]:
        assert each["floor"] == 1 / (1 + each["in_flight"])
        assert each["excess"] == each["waited_share"] - each["floor"]
    assert (answer["missing"], answer["revised"]) == ({}, 0)


def test_files_that_cannot_be_read_are_told_and_the_answer_is_partial(
    tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    write_store(tables, str(tmp_path))
    (path, *_) = sorted((tmp_path / "v1/sealed/requests").iterdir())
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-2000] + bytes(2000))
    found = run(tmp_path)
    assert found.exit_code == 5
    assert "The record is partial: 1 stretch of the store's files cannot be read." in found.output
    assert json.loads(run(tmp_path, "--json").stdout)["num_damaged"] == 1


def test_stored_rows_are_counted_from_the_segments(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    write_store(tables, str(tmp_path / "store"))
    found = stalls_of(open_store(tmp_path / "store"))
    assert found is not None
    assert found.stored == {name: rows.num_rows for name, rows in tables.items()}
    (segment,) = (tmp_path / "store/v1/sealed/requests").iterdir()
    segment.unlink()
    found = stalls_of(open_store(tmp_path / "store"))
    assert found is not None
    assert "requests" not in found.stored


def test_people_get_sentences_and_a_table_with_a_bar(store: Path) -> None:
    text = run(store).stdout
    assert "- stage 1 limits the pipeline" in text
    assert " s from the first step to the last:" in text
    assert "  stage 0: " in text and "micro-batches in flight" in text
    assert "What helps:" in text
    assert "D wait_downstream on rank 1" in text
    bars = [line.strip() for line in text.splitlines() if set(line.strip()) <= set("CHGKLUDT-X?o") and len(line) > BAR]
    assert [len(bar) for bar in bars] == [BAR, BAR]
    assert bars[1].count("C") > bars[0].count("C")


def test_a_partial_record_exits_5_and_says_what_is_missing(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    beats = tables["health"].to_pylist()
    beats[-1]["dropped"] = [{"table": "intervals", "reason": "ring_full", "rows": 12}]
    gap = {"epoch": 1, "rank": 0, "stage": 0, "row_seq": 0, "num_rows": 3, "reason": "torn_tail"}
    broken = {
        **tables,
        "health": pa.Table.from_pylist(beats, schema=schema_of("health")),
        "gaps": pa.Table.from_pylist([gap], schema=schema_of("gaps")),
    }
    write_store(broken, str(tmp_path / "store"))
    found = run(tmp_path / "store")
    assert found.exit_code == 5
    assert "rows missing: 12 (ring_full), 3 (torn_tail)" in found.stdout


def test_expired_rows_are_said_and_not_missing(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    epoch = tables["steps"]["epoch"][0].as_py()
    told = [
        ("steps/collector-0000000003.arrow", epoch),
        ("steps/collector-0000000003.arrow", epoch),  # told again after a crash
        ("steps/collector-0000000004.arrow", epoch),
        ("steps/simulated-0000000003.arrow", epoch),  # told to have gone, and still there
        ("steps/collector-0000000009.arrow", 999_999),  # of another run
    ]
    gaps = [
        {
            "epoch": 1,
            "rank": 0,
            "stage": 0,
            "row_seq": n,
            "source_epoch": of,
            "table": "steps",
            "num_rows": 10,
            "reason": "expired",
            "file": file,
        }
        for n, (file, of) in enumerate(told)
    ]
    write_store({**tables, "gaps": pa.Table.from_pylist(gaps, schema=schema_of("gaps"))}, str(tmp_path / "store"))
    assert (tmp_path / "store/v1/sealed/steps/simulated-0000000003.arrow").exists()
    found = run(tmp_path / "store", "--json")
    answer = json.loads(found.stdout)
    assert (found.exit_code, answer["missing"], answer["records"]["expired"]) == (0, {}, {"steps": 20})
    assert "20 older rows of this run have expired" in run(tmp_path / "store").stdout


def test_erased_rows_are_said_from_the_order_on_and_counted_once(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_store(tables, str(store))
    request = tables["requests"]["request"][0].as_py()
    num_rows = tables["requests"]["request"].to_pylist().count(request)
    before = json.loads(run(store, "--json").stdout)["records"]
    assert before["erased"] == {}
    for words in (["erase", str(store), "--request", request, "--yes"], ["compact", str(store)]):
        assert CliRunner().invoke(store_commands, words).exit_code == 0
        found = run(store, "--json")
        records = json.loads(found.stdout)["records"]
        assert (found.exit_code, records["erased"]) == (0, {"requests": num_rows}), words[0]
        assert records["stored"]["requests"] + num_rows == before["stored"]["requests"]
    assert f"{num_rows} rows of this run have been erased on demand" in run(store).stdout


@pytest.mark.parametrize("make", [False, True])
def test_a_missing_or_empty_store_is_one_line(tmp_path: Path, make: bool) -> None:
    if make:
        write_store({}, str(tmp_path / "store"))
    found = run(tmp_path / "store")
    assert found.exit_code == 1
    assert found.output.count("\n") == 1


def test_the_window_begins_after_warmup_and_ends_with_the_last_traffic_step(tables: dict[str, pa.Table]) -> None:
    window = traffic_window(tables)
    assert window is not None
    steps = [row for row in tables["steps"].to_pylist() if row["stage"] == 0]
    traffic = [row for row in steps if not row["rows"][0]["request"].startswith("warmup-")]
    last = {row["step_id"] for row in traffic}
    ends = [row["t1_ns"] for row in tables["intervals"].to_pylist() if row["step_id"] in last]
    assert window == (min(row["t0_ns"] for row in traffic), max(ends))


def test_only_warmup_is_no_traffic() -> None:
    assert traffic_window(simulate(Scenario(seconds=0.0))) is None


def test_each_run_of_a_store_can_be_asked_for(tables: dict[str, pa.Table], store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    write_store(tables, str(path))
    later = [row | {"run": "ab" * 8, "epoch": row["epoch"] + 5000} for row in tables["sources"].to_pylist()]
    later = [row | {"unix_anchor_ns": row["unix_anchor_ns"] + 10**12} for row in later]
    write_store({"sources": pa.Table.from_pylist(later, schema=schema_of("sources"))}, str(path), seqs={})
    first = tables["sources"]["run"][0].as_py()
    assert json.loads(run(path, "--json").stdout)["run"] == "ab" * 8
    assert first in run(path).stdout
    asked = json.loads(run(path, "--run", first[:4], "--json").stdout)
    assert (asked["run"], asked["other_runs"]) == (first, ["ab" * 8])
    assert asked["verdicts"] == json.loads(run(store, "--json").stdout)["verdicts"]
    wrong = run(path, "--run", "ffff")
    assert wrong.exit_code == 1
    assert "no run 'ffff'" in wrong.output


def test_a_change_is_predicted_for_people_and_as_json(store: Path) -> None:
    """The run slept 15 ms a step on stage 1: without, it is as fast as its baseline."""
    text = run(store, "--if", "speed=1:-15ms").stdout
    assert re.search(
        r"If speed=1:-15ms: \d+ tokens/s instead of \d+ while there is work \(\d\.\d\dx, within \d+ %\)", text
    )
    assert "unchanged it misses the record by" in text
    answer = json.loads(run(store, "--json", "--if", "replace=1").stdout)
    found = answer["prediction"]
    assert found["if"] == ["replace=1"]
    assert found["throughput_ratio"] > 1.5
    period = found["step_period_ns"]
    assert period["before"] / period["after"] == pytest.approx(found["throughput_ratio"], rel=0.01)
    assert found["residual"] < 0.05 <= found["error"]
    assert (found["in_flight"], found["num_steps"] > 100) == (2, True)
    assert (answer["no_prediction"], json.loads(run(store, "--json").stdout)["prediction"]) == (None, None)


@pytest.mark.parametrize("change", ["split=9,9", "split", "in-flight=0", "speed=5:2", "replace=4", "cores=3"])
def test_a_change_that_cannot_be_is_one_line_and_a_usage_error(store: Path, change: str) -> None:
    found = run(store, "--if", change)
    assert found.exit_code == 2
    assert found.output.splitlines()[-1].startswith("Error: --if: ")
    assert found.stdout == ""


def test_a_store_without_a_pipeline_predicts_nothing_and_says_why(tmp_path: Path) -> None:
    write_store(simulate(Scenario(seconds=3.0, base_ms=(5.0,), in_flight=1)), str(tmp_path / "store"))
    found = run(tmp_path / "store", "--if", "in-flight=2")
    assert (found.exit_code, "nothing can be predicted: it needs 12 steps" in found.stdout) == (0, True)
    answer = json.loads(run(tmp_path / "store", "--if", "in-flight=2", "--json").stdout)
    assert answer["prediction"] is None
    assert answer["no_prediction"].startswith("nothing can be predicted")


def test_where_requests_time_went_is_in_the_document_and_the_text(store: Path) -> None:
    document = json.loads(run(store, "--json").stdout)["requests"]
    assert sum(document["seconds"].values()) > 0
    assert document["slowest"]["seconds"]["decode"] > 0
    assert "Where requests' time went" in run(store).stdout
    one = run(store, "--request", document["slowest"]["request"])
    assert f"Request {document['slowest']['request']}: " in one.stdout
    unknown = run(store, "--request", "nobody")
    assert (unknown.exit_code, unknown.stderr) == (1, "Error: no request 'nobody' in this run\n")


# -- a run of several replicas ----------------------------------------------------------------------------------------

OF_A_REPLICA = ("verdicts", "ledger_window_unix_ns", "ledger", "overlap_ns", "unattributed_ns", "bubble", "requests")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two engines side by side, each with its own driver; stage 1 of the second becomes slow."""
    path = tmp_path_factory.mktemp("engines") / "store"
    slow = Fault("slow", 4.0, 1, replica=1, ms=15.0)
    write_store(of_engines(Scenario(seed=5, seconds=10.0, replicas=2, faults=(slow,))), str(path))
    return path


def test_each_replica_has_its_section_with_its_verdicts_and_requests(engines: Path) -> None:
    text = run(engines).stdout
    head, *sections = re.split(r"^Replica (\d)$", text, flags=re.MULTILINE)
    assert head == f"{engines}, run {RUN}, 2 replicas\n\n"
    slow, second, even, first = sections
    assert (slow, even) == ("1", "0"), "what is worst comes first"
    assert "stage 1 limits the pipeline" in second and "stage 1 limits the pipeline" not in first
    for section, ranks in ((first, (0, 1)), (second, (2, 3))):
        assert "Where requests' time went" in section
        assert re.findall(r"^ +[01] +(\d)    C compute", section, flags=re.MULTILINE) == [str(rank) for rank in ranks]


def test_the_document_of_several_replicas_has_a_part_for_each(engines: Path) -> None:
    answer = json.loads(run(engines, "--json").stdout)
    assert (answer["schema"], answer["run"], answer["missing"]) == ("insitu.stalls/1", RUN, {})
    assert [part["replica"] for part in answer["replicas"]] == [0, 1]
    assert not set(OF_A_REPLICA[1:]) & set(answer), "what is of one replica stands in its part"
    assert [[v["kind"] for v in part["verdicts"]] for part in answer["replicas"]] == [["healthy"], ["stage_limits"]]
    assert [(v["kind"], v["rank"], v["replica"]) for v in answer["verdicts"]] == [
        ("stage_limits", 3, 1),
        ("healthy", None, 0),
    ], "most severe first, whichever replica's"
    assert [sorted({row["rank"] for row in part["ledger"]}) for part in answer["replicas"]] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("replica", [0, 1])
def test_one_replica_alone_is_said_as_a_run_of_one_is(engines: Path, store: Path, replica: int) -> None:
    whole, alone = (json.loads(run(engines, "--json", *more).stdout) for more in ((), ("--replica", replica)))
    single = json.loads(run(store, "--json").stdout)
    assert set(alone) == {*single, "replica"}, "a run of one replica does not say which"
    assert {name: alone[name] for name in whole["replicas"][replica]} == whole["replicas"][replica]
    assert {name: alone[name] for name in whole if name not in ("verdicts", "replicas")} == {
        name: value for name, value in whole.items() if name not in ("verdicts", "replicas")
    }
    text = run(engines, "--replica", replica).stdout
    assert text.startswith(f"{engines}, run {RUN}, replica {replica} of 2 replicas\n\n- ")
    assert f"Replica {replica}" not in text


def test_a_replica_that_is_not_there_is_one_line(engines: Path, store: Path) -> None:
    assert run(engines, "--replica", 2).output == f"Error: run {RUN} has no replica 2; it has 0, 1\n"
    wrong = run(store, "--replica", 1)
    assert (wrong.exit_code, wrong.stderr) == (1, f"Error: run {RUN} has no replica 1; it has 0\n")


def test_a_request_is_told_of_by_the_replica_that_knows_it(engines: Path) -> None:
    answer = json.loads(run(engines, "--json").stdout)
    name = answer["replicas"][1]["requests"]["slowest"]["request"]
    asked = json.loads(run(engines, "--json", "--request", name).stdout)
    told = [part["requests"]["asked"] for part in asked["replicas"]]
    assert (told[0], told[1]["request"]) == (None, name)
    assert run(engines, "--request", name).stdout.count(f"Request {name}: ") == 1
    for more in ((), ("--replica", 1)):
        unknown = run(engines, "--request", "nobody", *more)
        assert (unknown.exit_code, unknown.stderr) == (1, "Error: no request 'nobody' in this run\n")
    assert run(engines, "--request", name, "--replica", 0).exit_code == 1


def test_a_change_is_predicted_of_each_replica_that_has_the_place(engines: Path) -> None:
    first, second = json.loads(run(engines, "--json", "--if", "replace=3").stdout)["replicas"]
    assert first["prediction"] is None
    assert first["no_prediction"] == "nothing can be predicted: there is no rank 3; the run has ranks 0, 1"
    assert second["prediction"]["throughput_ratio"] > 1.3
    assert run(engines, "--if", "replace=3", "--replica", 0).exit_code == 2


def test_what_the_judge_wrote_is_told_of_the_replica_it_speaks_of(engines: Path, tmp_path: Path) -> None:
    """Names of verdicts of a first replica are the beginning of those of the others."""
    path = shutil.copytree(engines, tmp_path / "store")
    unjudged = json.loads(run(path, "--json").stdout)
    assert [verdict.kind for verdict in final_verdicts(open_store(path))] == ["stage_limits"], "of every replica"
    assert CliRunner().invoke(judge, [str(path), "--once"]).exit_code == 0
    told = open_store(path).table("verdicts")["verdict"].to_pylist()
    assert {name.partition("-")[0] for name in told} == {RUN[:8], f"{RUN[:8]}.1"}
    judged = json.loads(run(path, "--json").stdout)
    assert judged["verdicts"] == unjudged["verdicts"]
    assert [part["verdicts"] for part in judged["replicas"]] == [part["verdicts"] for part in unjudged["replicas"]]


def test_one_driver_of_two_replicas_is_of_both(tmp_path: Path) -> None:
    write_store(simulate(Scenario(seed=5, seconds=4.0, replicas=2)), str(tmp_path / "store"))
    answer = json.loads(run(tmp_path / "store", "--json").stdout)
    slowest = [part["requests"]["slowest"]["request"] for part in answer["replicas"]]
    assert ["-r1-" in name for name in slowest] == [False, True]
