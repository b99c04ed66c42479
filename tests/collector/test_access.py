"""Who may call a collector, with real servers and clients over TLS. `row_N`: of the failure matrix."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from access_kit import (
    LONG_AGO,
    Rig,
    audits,
    calling,
    events,
    leaf_with_uri,
    refused,
    rig,
    shipping,
    sources,
    status_of,
    texts,
    write,
    write_pair,
)
from click.testing import CliRunner, Result
from wait_kit import until

import insitu
from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.credentials import Credentials
from insitu.exporters import Retry
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.segments.shard import ShardWriter
from insitu.wire.insitu_pb2 import ClockQuery, Hello, RulesOrder, RulesQuery, ToCollector
from insitu_collector.access.gate import Access, Gate
from insitu_collector.access.roles import Role
from insitu_collector.access.tokens import Entry, digest_of
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

__all__ = ["rig"]

Given = Callable[[Rig], Credentials]


def ship(exporter: CollectorExporter, *seqs: int) -> None:
    """Export as the drain does: again after a while when the exporter asks for it."""
    for seq in seqs:
        while True:
            try:
                exporter.export(events(seq, text=str(seq)))
                break
            except Retry as retry:
                threading.Event().wait(retry.after_s)


# -- who is let in -------------------------------------------------------------------------------------------------


def test_a_token_over_tls_ships_and_its_tenant_is_what_the_store_says(rig: Rig) -> None:
    credentials = rig.with_token(rig.entry("rank-0", tenant="team-a"))
    source = Source(epoch=7)
    with rig.serving() as server:
        assert server.address.startswith("grpcs://127.0.0.1:")
        with shipping(server, credentials) as exporter:
            exporter.export(sources(source, tenant="team-b"))
            ship(exporter, 0)
            assert exporter.flush(20)
    rows = open_store(server.store).table("sources").to_pylist()
    assert {row["epoch"]: row["tenant"] for row in rows}[7] == "team-a", "whatever the probe claims"
    assert [row["tenant"] for row in rows if row["epoch"] != 7] == [None], "the collector's own"


@pytest.mark.parametrize("name", ["agent.example.com", "spiffe://example.com/agent"])
def test_a_certificate_may_name_an_entry_instead_of_a_token(rig: Rig, name: str) -> None:
    leaf = leaf_with_uri(rig.ca, name) if "://" in name else rig.ca.issue_cert(name)
    rig.entry("agent", tenant="team-a", san=name)
    with rig.serving(client_ca=True) as server, shipping(server, rig.with_leaf(leaf)) as exporter:
        exporter.export(sources(Source(epoch=7)))
        assert exporter.flush(20)
    assert open_store(server.store).table("sources").to_pylist()[-1]["tenant"] == "team-a"


def test_without_tokens_a_certificate_of_the_authority_is_enough(rig: Rig) -> None:
    anybody = rig.with_leaf(rig.ca.issue_cert("anybody.example.com"))
    with rig.serving(client_ca=True, tokens=False) as server, shipping(server, anybody) as exporter:
        ship(exporter, 0)
        assert exporter.flush(20)
    assert texts(server.store) == ["0"]


def test_tokens_work_without_tls_on_this_host_alone(rig: Rig) -> None:
    credentials = rig.with_token(rig.entry("rank-0"))
    with rig.serving(tls=False) as server:
        assert "no token came with the call; set INSITU_TOKEN_FILE" in refused(server, Credentials())
        with shipping(server, credentials) as exporter:
            ship(exporter, 0)
            assert exporter.flush(20)


def test_each_call_needs_its_role(rig: Rig) -> None:
    ship_only = rig.with_token(rig.entry("ship", Role.SHIP), "ship")
    admin = rig.with_token(rig.entry("admin", Role.ADMIN), "admin")
    reader = rig.with_token(rig.entry("read", Role.READ), "read")
    with rig.serving() as server:
        for credentials in (ship_only, reader):
            with calling(server, credentials) as stub:
                assert stub.Clock(ClockQuery()).boot_id, "whoever is known may compare clocks"
                for ask, question in ((stub.ShowRules, RulesQuery()), (stub.SetRules, RulesOrder())):
                    with pytest.raises(grpc.RpcError) as error:
                        ask(question)
                    code, text = status_of(error.value)
                    assert code is grpc.StatusCode.PERMISSION_DENIED
                    assert text.endswith("has not the role admin; add it to `roles` of that entry in the tokens file")
        with calling(server, admin) as stub, pytest.raises(grpc.RpcError) as error:
            stub.ShowRules(RulesQuery())
        assert status_of(error.value)[0] is grpc.StatusCode.NOT_FOUND, "let in; there are no ranks"
        assert "admin has not the role ship" in refused(server, admin)
        assert "read has not the role ship" in refused(server, reader)
    assert texts(server.store) == []


def test_loopback_has_no_privilege_where_there_are_tokens(rig: Rig) -> None:
    rig.entry("somebody")
    with rig.serving(tls=False) as server, calling(server, Credentials()) as stub:
        for ask, question in ((stub.Clock, ClockQuery()), (stub.ShowRules, RulesQuery())):
            with pytest.raises(grpc.RpcError) as error:
                ask(question)
            assert status_of(error.value)[0] is grpc.StatusCode.UNAUTHENTICATED


# -- row 21: who is not --------------------------------------------------------------------------------------------


def no_token(rig: Rig) -> Credentials:
    return Credentials(ca_file=str(rig.ca_file))


def unknown_token(rig: Rig) -> Credentials:
    return rig.with_token("insitu_" + "A" * 43)


def expired_token(rig: Rig) -> Credentials:
    return rig.with_token(rig.entry("old", expires=LONG_AGO))


def other_authority_here(rig: Rig) -> Credentials:
    other = write(rig.folder / "other.pem", trustme.CA().cert_pem.bytes())
    return Credentials(rig.token_file(rig.entry("mine")), str(other))


@pytest.mark.parametrize(
    ("given", "said", "audit"),
    [
        (no_token, "no token came with the call; set INSITU_TOKEN_FILE", "no_token"),
        (unknown_token, "the token is none of this collector's", "unknown_token"),
        (expired_token, "the entry old of the tokens file has expired", "expired"),
        (other_authority_here, "is of no authority that is known here; name that one's", "tls_handshake"),
    ],
)
def test_row_21_who_has_no_token_is_told_why_and_writes_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, given: Given, said: str, audit: str
) -> None:
    monkeypatch.setattr("insitu_collector.access.audit.HANDSHAKE_S", 0.0)
    rig.entry("somebody")
    credentials = given(rig)
    with rig.serving() as server:
        assert said in refused(server, credentials)
        until(lambda: any(audit in text for text in audits(server.store)), "the audit event")
    assert texts(server.store) == []
    assert len(open_store(server.store).table("sources")) == 1, "the collector's own row"


def expired_certificate(rig: Rig) -> Credentials:
    return rig.with_leaf(rig.ca.issue_cert("agent.example.com", not_after=LONG_AGO))


def certificate_of_another_authority(rig: Rig) -> Credentials:
    return rig.with_leaf(trustme.CA().issue_cert("agent.example.com"))


@pytest.mark.parametrize("given", [no_token, expired_certificate, certificate_of_another_authority])
def test_row_21_a_bad_certificate_ends_in_the_handshake_which_is_counted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, given: Given
) -> None:
    monkeypatch.setattr("insitu_collector.access.audit.HANDSHAKE_S", 0.0)
    monkeypatch.setattr("insitu.credentials.try_client", lambda *_: None)  # not everybody looks at its own first
    rig.entry("agent", san="agent.example.com")
    with rig.serving(client_ca=True) as server:
        assert "set INSITU_CLIENT_CERT and INSITU_CLIENT_KEY to one that its authority" in refused(server, given(rig))
        until(lambda: any("tls_handshake" in text for text in audits(server.store)), "the audit event")
    assert texts(server.store) == []


def test_row_21_a_certificate_that_was_taken_out_of_the_file_is_known_no_more(rig: Rig) -> None:
    rig.entry("agent", san="agent.example.com")
    credentials = rig.with_leaf(rig.ca.issue_cert("agent.example.com"))
    with rig.serving(client_ca=True) as server, shipping(server, credentials) as exporter:
        ship(exporter, 0)
        assert exporter.flush(20)
        rig.replace_entries()
        said = until(lambda: exporter.barred, "its stream to end")
        until(lambda: any("revoked" in text for text in audits(server.store)), "the audit event")
        ship(exporter, 1)
        assert not exporter.flush(0.2)
    assert "not in the tokens file any more" in said or "no entry of the tokens file has `san`" in said
    assert texts(server.store) == ["0"]


def test_row_21_a_forged_tenant_gets_nowhere(rig: Rig) -> None:
    mine = rig.with_token(rig.entry("a", tenant="team-a"), "a")
    theirs = rig.with_token(rig.entry("b", tenant="team-b"), "b")
    with rig.serving() as server:
        with shipping(server, mine) as exporter:
            exporter.export(sources(Source(epoch=7)))
            ship(exporter, 0)
            assert exporter.flush(20)
        assert "records belong to another tenant" in refused(server, theirs)
        until(lambda: "refused 1 of b: other_tenant" in audits(server.store), "the audit event")
    with rig.serving() as server:
        assert "records belong to another tenant" in refused(server, theirs), "after a restart, too"
        with shipping(server, mine) as exporter:
            ship(exporter, 1)
            assert exporter.flush(20)
    assert texts(server.store) == ["0", "1"]


TRAVERSAL = ["../../../etc/cron.d/x", "/etc/x", "..", "a/../../b", "a\x00b", "\n[[token]]", "%2e%2e%2f"]


@pytest.mark.parametrize("name", TRAVERSAL)
def test_row_21_nothing_from_the_wire_becomes_a_path(rig: Rig, name: str) -> None:
    credentials = rig.with_token(rig.entry("rank-0", tenant="team-a"))
    store = rig.folder / "deep" / "er" / "store"
    store.parent.mkdir(parents=True)
    before = set(rig.folder.rglob("*"))
    with rig.serving(store) as server:
        source = Source(epoch=7, run=name, host=name, model=name, version=name, config_digest=name)
        exporter = CollectorExporter(server.address, source, credentials=credentials)
        exporter.export(sources(source, tenant=name))
        exporter.export(events(0, text=name))
        assert exporter.flush(20)
        exporter.close(1.0)
    made = set(rig.folder.rglob("*")) - before - {store}
    assert all(path.is_relative_to(store) for path in made)
    files = {path.name for path in made if path.is_file()}
    assert all(file == "id" or file.startswith("collector-0000") for file in files), files
    assert not Path("/etc/x").exists()


# -- tenants and rules ---------------------------------------------------------------------------------------------


def test_a_tenant_sees_and_changes_the_rules_of_its_own_runs_alone(rig: Rig) -> None:
    ship_a = rig.with_token(rig.entry("rank-a", tenant="team-a"), "rank-a")
    admins = {
        tenant: rig.with_token(rig.entry(f"admin-{tenant}", Role.ADMIN, tenant=tenant), f"admin-{tenant}")
        for tenant in ("team-a", "team-b", "")
    }
    with rig.serving() as server, calling(server, ship_a) as stub, ExitStack() as stack:
        done = threading.Event()
        stack.callback(done.set)

        def messages() -> Any:
            labels = {"role": "rank", "run": "0123", "rank": "0", "replica": "0", "stage": "0", "rules": "1"}
            yield ToCollector(hello=Hello(protocol=1, epoch=7, source=labels))
            done.wait(60)

        call = stub.Ship(messages())
        stack.callback(call.cancel)

        def show(tenant: str) -> tuple[grpc.StatusCode, str]:
            with calling(server, admins[tenant]) as admin:
                try:
                    return grpc.StatusCode.OK, admin.ShowRules(RulesQuery(run="0123"), timeout=20).runs[0].run
                except grpc.RpcError as error:
                    return status_of(error)

        until(lambda: show("team-a") == (grpc.StatusCode.OK, "0123") or None, "the rank to be there")
        assert show("") == (grpc.StatusCode.OK, "0123"), "the owner of the collector sees all"
        code, text = show("team-b")
        assert code is grpc.StatusCode.NOT_FOUND
        assert "of run 0123 there are" not in text, "nor is it told that there are others"
        with calling(server, admins["team-b"]) as admin, pytest.raises(grpc.RpcError) as error:
            admin.SetRules(RulesOrder(run="0123", toml=b"", who="b"), timeout=20)
        assert status_of(error.value)[0] is grpc.StatusCode.NOT_FOUND


# -- row 22: rotation ----------------------------------------------------------------------------------------------


class Load:
    """Rows that go on being shipped by a thread of their own."""

    def __init__(self, exporter: CollectorExporter) -> None:
        self._exporter = exporter
        self._stop = threading.Event()
        self.num = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            ship(self._exporter, self.num)
            self.num += 1

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def goes_on(self) -> None:
        """Wait until rows that are made from now on are durable."""
        target = self.num + 5
        until(lambda: self._exporter.durable(events(0).stream) >= target or None, "rows to be durable")


def test_row_22_a_token_is_rotated_under_load(rig: Rig) -> None:
    old = rig.entry("rank-0", tenant="team-a")
    credentials = rig.with_token(old)
    with rig.serving() as server, shipping(server, credentials) as exporter:
        with Load(exporter) as load:
            load.goes_on()
            new = rig.entry("rank-0-next", tenant="team-a")
            rig.token_file(new)
            load.goes_on()
            rig.replace_entries(Entry("rank-0-next", frozenset({Role.SHIP}), "team-a", digest_of(new)))
            until(lambda: any("revoked" in text for text in audits(server.store)), "the old token's stream to end")
            load.goes_on()
        assert exporter.flush(20)
        assert exporter.refused() == []
    assert texts(server.store) == [str(seq) for seq in range(load.num)], "each row once"
    told = audits(server.store)
    assert any("added rank-0-next" in text for text in told) and any("removed rank-0" in text for text in told)


def test_row_22_a_certificate_is_rotated_under_load(rig: Rig) -> None:
    """New connections get the new one, at first half of a pair changes nothing, and old streams live on."""
    credentials = rig.with_token(rig.entry("rank-0"))
    with rig.serving() as server, shipping(server, credentials) as exporter, Load(exporter) as load:
        load.goes_on()
        other = trustme.CA()
        leaf = other.issue_cert("127.0.0.1")
        write(rig.cert, leaf.cert_chain_pems[0].bytes())
        until(lambda: any("certificate not changed" in text for text in audits(server.store)), "a word about the half")
        load.goes_on()
        write_pair(rig.folder, "server", leaf)
        until(lambda: any("changed; the new one is good until" in text for text in audits(server.store)), "the change")
        load.goes_on()
        assert "is of no authority that is known here" in refused(server, credentials, epoch=8), (
            "it is shown the new one"
        )
        write(rig.ca_file, other.cert_pem.bytes())
        with calling(server, credentials) as stub:
            assert stub.Clock(ClockQuery(), timeout=20).boot_id
        load.goes_on()
    said = audits(server.store)
    assert len([text for text in said if "certificate not changed" in text]) == 1, "once"


def test_row_22_the_authority_of_callers_is_rotated(rig: Rig) -> None:
    client_ca = write(rig.folder / "clients.pem", rig.ca.cert_pem.bytes())
    files = rig.access(client_ca=True, tokens=False).tls
    assert files is not None
    access = Access(type(files)(files.cert, files.key, client_ca))
    old = rig.with_leaf(rig.ca.issue_cert("old.example.com"), "old")
    other = trustme.CA()
    new = rig.with_leaf(other.issue_cert("new.example.com"), "new")
    with CollectorServer(rig.folder / "store", port=0, access=access) as server, shipping(server, old) as exporter:
        ship(exporter, 0)
        assert exporter.flush(20)
        write(client_ca, other.cert_pem.bytes())
        until(lambda: any("changed; the new one" in text for text in audits(server.store)), "the change")
        with shipping(server, new, epoch=8) as second:
            second.export(events(0, epoch=8, text="new"))
            assert second.flush(20)
        assert "INSITU_CLIENT_CERT" in refused(server, old, epoch=9)
        ship(exporter, 1)
        assert exporter.flush(20), "its stream lives on"
    assert sorted(texts(server.store)) == ["0", "1", "new"]


# -- what is told --------------------------------------------------------------------------------------------------


def test_who_is_refused_says_so_once_and_does_not_hurry(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.entry("somebody")
    with rig.serving() as server, caplog.at_level(logging.INFO, "insitu"):
        with shipping(server, no_token(rig)) as exporter:
            exporter.export(events(0))
            until(lambda: exporter.barred, "the refusal")
            with pytest.raises(Retry):
                exporter.export(events(1))
            assert not exporter.flush(1.0)
        said = [record.getMessage() for record in caplog.records if "refuses this caller" in record.getMessage()]
    assert len(said) == 1
    assert said[0].endswith(". Records are kept meanwhile, as far as max_queue_bytes or a spool has room")
    assert "\n" not in said[0]
    told = [re.fullmatch(r"refused (\d+) of 127\.0\.0\.1: no_token", text) for text in audits(server.store)]
    assert sum(int(match[1]) for match in told if match) <= 2, "once more at once: a file may have changed"


def test_a_token_is_in_no_log_no_event_and_no_representation(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    good, old = rig.entry("good", tenant="team-a"), rig.entry("old", expires=LONG_AGO)
    unknown = "insitu_" + "Z" * 43
    shown: list[str] = []
    with caplog.at_level(logging.DEBUG), rig.serving() as server:
        for name, token in (("old", old), ("unknown", unknown)):
            shown.append(refused(server, rig.with_token(token, name)))
        credentials = rig.with_token(good, "good")
        with shipping(server, credentials) as exporter:
            ship(exporter, 0)
            assert exporter.flush(20)
            shown += [repr(credentials), repr(vars(exporter)), repr(vars(server.gate))]
            rig.tokens.chmod(0o644)
            until(lambda: any("mode 0644" in text for text in audits(server.store)), "a word about the mode")
            rig.tokens.write_text(f'[[token]]\nname = "{good}"\n{good}')
            rig.tokens.chmod(0o600)
            until(lambda: any("no TOML" in text for text in audits(server.store)), "a word about the text")
            ship(exporter, 1)
            assert exporter.flush(20), "the old entries hold"
    everything = "\n".join([caplog.text, *shown, *audits(server.store), rig.folder.joinpath("store").name])
    for token in (good, old, unknown):
        assert token not in everything and token[7:] not in everything
    files = [path.read_bytes() for path in (rig.folder / "store").rglob("*") if path.is_file()]
    assert not any(token.encode() in data for token in (good, old, unknown) for data in files)


def test_a_gate_without_files_is_open_on_this_host() -> None:
    assert not Gate().is_guarded


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[[Credentials], None]:
    """Let commands and sessions show these credentials."""

    def show(credentials: Credentials) -> None:
        for name in credentials.named:
            monkeypatch.setenv(f"INSITU_{name.upper()}", getattr(credentials, name))

    return show


def one_line(result: Result, status: int) -> str:
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def test_rules_are_asked_for_with_credentials_and_refused_in_one_line(
    rig: Rig, shown: Callable[[Credentials], None]
) -> None:
    ship_only, admin = rig.entry("ship"), rig.entry("ops", Role.ADMIN)
    with rig.serving() as server:
        at = ["rules", "show", "--at", server.address]
        line = one_line(CliRunner().invoke(command, at), 4)
        assert line.endswith("is of no authority that is known here; name that one's certificate with INSITU_CA_FILE")
        shown(Credentials(ca_file=str(rig.ca_file)))
        assert "no token came with the call" in one_line(CliRunner().invoke(command, at), 1)
        shown(rig.with_token(ship_only))
        assert "ship has not the role admin" in one_line(CliRunner().invoke(command, at), 1)
        rig.token_file(admin)
        assert "no rank is connected" in one_line(CliRunner().invoke(command, at), 1), "let in"
        shown(Credentials(client_cert="/x"))
        line = one_line(CliRunner().invoke(command, at), 2)
        assert line == "Error: client_cert is set and client_key is not; set INSITU_CLIENT_KEY, too"


READING = ("stalls URL", "compare URL URL", "incidents URL", "export URL --to csv", "rules show")


@pytest.mark.parametrize("words", READING)
def test_a_credential_that_cannot_be_used_is_one_line_of_each_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    (tmp_path / "ca.pem").write_text("no PEM")
    monkeypatch.setenv("INSITU_CA_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("INSITU_TO", "grpcs://127.0.0.1:9")
    result = CliRunner().invoke(command, words.replace("URL", "grpcs://127.0.0.1:9").split())
    assert result.exit_code == ExitCode.USAGE
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: ca_file {tmp_path / 'ca.pem'} has no certificate in PEM; give a file that has one")
    assert line.endswith("(INSITU_CA_FILE)")


def test_a_store_is_forwarded_with_credentials(rig: Rig, shown: Callable[[Credentials], None]) -> None:
    token = rig.entry("edge", tenant="team-a")
    here, source = rig.folder / "here", Source(epoch=7)
    writer = ShardWriter(here, "h-1")
    for batch in (sources(source), events(0, text="0"), events(1, text="1")):
        writer.append(batch)
    writer.close()
    with rig.serving() as server:
        forward = ["forward", str(here), "--to", server.address]
        shown(Credentials(ca_file=str(rig.ca_file)))
        assert "no token came with the call" in one_line(CliRunner().invoke(command, forward), 4), "without waiting"
        shown(rig.with_token(token))
        ran = CliRunner().invoke(command, [*forward, "--json"])
        assert (ran.exit_code, json.loads(ran.stdout)["rows"]) == (0, 3), ran.output
    assert texts(server.store) == ["0", "1"]
    assert {row["epoch"]: row["tenant"] for row in open_store(server.store).table("sources").to_pylist()}[7] == "team-a"


def test_a_session_ships_with_what_the_settings_name(rig: Rig, shown: Callable[[Credentials], None]) -> None:
    shown(rig.with_token(rig.entry("rank-0", tenant="team-a")))
    with rig.serving() as server:
        with insitu.start(to=server.address) as session:
            session.event("incident", text="seen")
            assert session.flush().pending == 0
        assert "seen" in texts(server.store)


def test_a_session_goes_on_where_it_is_refused_and_spools(
    rig: Rig, shown: Callable[[Credentials], None], caplog: pytest.LogCaptureFixture
) -> None:
    shown(Credentials(ca_file=str(rig.ca_file)))
    rig.entry("somebody")
    spool = rig.folder / "spool"
    with rig.serving() as server, caplog.at_level(logging.INFO, "insitu"):
        with insitu.start(to=server.address, spool=str(spool)) as session:
            session.event("incident", text="kept")
            until(lambda: session.flush().pending == 0, "what is refused to be spooled")
        assert texts(server.store) == []
    assert "no token came with the call" in caplog.text
    assert texts(spool) == ["kept"]
