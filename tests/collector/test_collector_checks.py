"""`insitu doctor` and a collector: there or not, ready or not, and what was refused and lost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from access_kit import LONG_AGO, Rig, write_pair
from access_kit import rig as rig
from click.testing import CliRunner
from wire_kit import Client, events, frame, hello

from insitu import doctor
from insitu.collector_checks import checks_of, collector_checks
from insitu.credentials import Credentials
from insitu.doctor import Status
from insitu.wire.insitu_pb2 import HealthAnswer
from insitu_collector.service.server import CollectorServer


def test_a_collector_that_is_well_is_told_in_lines_and_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CollectorServer(tmp_path, port=0) as server:
        target = server.address
        found = {check.check: check for check in collector_checks(target)}
        assert list(found) == [
            "collector", "collector disk", "collector refused", "collector ended", "rows dropped", "rows lost",
        ]  # fmt: skip
        assert found["collector"].status is Status.OK
        assert "0 streams; ready: it can store durably" in found["collector"].why
        assert "GiB free where its store lies" in found["collector disk"].why
        told = json.loads(CliRunner().invoke(doctor.doctor, ["--collector", target, "--json"]).stdout)
        assert [check["check"] for check in told["checks"]][-6:] == list(found)
        lines = CliRunner().invoke(doctor.doctor, ["--collector", target]).stdout
        assert "rows lost         ok       nothing that it had is lost\n" in lines


def test_what_was_refused_is_told_by_reason(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as server:
        bad, client = frame(events(0)), Client(server)
        bad.frame.crc32 ^= 1
        client.send(hello(), bad, frame(events(1)))
        client.until_durable(1)
        found = {check.check: check for check in collector_checks(server.address)}
        client.close()
    assert found["collector refused"].status is Status.WARN
    assert found["collector refused"].why == "frames by reason, since it started: refused_invalid 1"


def test_why_it_is_not_ready_is_told_with_the_remedy() -> None:
    answer = HealthAnswer(ready=False, reason="disk_full", text="the disk is full; make room there", free_bytes=5)
    answer.gap_rows.update({"expired": 9, "torn_tail": 2})
    answer.dropped_rows.update({"queue_full": 3})
    found = {check.check: check for check in checks_of("there:1", answer)}
    assert found["collector"].status is Status.PROBLEM
    assert "not ready (disk_full): the disk is full" in found["collector"].why
    assert found["collector"].fix == "make room there"
    assert found["collector disk"].status is Status.WARN
    assert found["rows dropped"].why.endswith(": queue_full 3")
    assert found["rows lost"].why.endswith(": torn_tail 2"), "what has expired is not lost"
    answer.gap_rows.update({"erased": 9, "corrupt": 4, "sent_again": 3})
    found = {check.check: check for check in checks_of("there:1", answer)}
    assert found["rows lost"].why.endswith(": corrupt 3"), "nor what came again"
    answer.gap_rows["sent_again"] = 7
    assert {check.check: check for check in checks_of("there:1", answer)}["rows lost"].status is Status.OK


def test_a_collector_that_is_not_there_is_a_problem_and_a_foreign_one_a_warning() -> None:
    (check,) = collector_checks("grpc://127.0.0.1:1")
    assert (check.status, check.fix) == (Status.PROBLEM, "insitu collect --store DIR --port 1")
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    (check,) = collector_checks(f"grpc://127.0.0.1:{port}")
    server.stop(None).wait()
    assert check.status is Status.WARN
    assert "no collector of this version" in check.why


def test_what_stands_between_this_caller_and_a_collector_is_told(rig: Rig, tmp_path: Path) -> None:
    with rig.serving(tokens=False) as server:
        (found,) = collector_checks(server.address, Credentials())
        assert found.why.endswith("is of no authority that is known here")
        assert found.fix == "name that one's certificate with INSITU_CA_FILE"
        cert, key = write_pair(tmp_path, "old", rig.ca.issue_cert("x", not_after=LONG_AGO))
        (found,) = collector_checks(server.address, Credentials(None, str(rig.ca_file), str(cert), str(key)))
    assert found.why == f"{cert} is no certificate that others take: certificate has expired"
    assert found.fix == "renew it (INSITU_CLIENT_CERT, INSITU_CLIENT_KEY)"
