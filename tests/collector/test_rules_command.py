"""`insitu rules` against a collector with ranks: they follow, it is recorded, and nothing bad gets through."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import insitu
from insitu.cli import insitu as command
from insitu.wire.insitu_pb2 import RulesOrder, RulesQuery
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

RUN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def run_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", RUN)
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CollectorServer]:
    with CollectorServer(tmp_path / "store", port=0) as running:
        yield running


class Ranks:
    """Two stages in this process; `step` runs both. Their records are durable once it returns."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stack = ExitStack()
        self.sessions: list[insitu.Session] = []
        self.nets: list[nn.Module] = []

    def add(self, net: nn.Module, rules: list[insitu.Rule] | None = None) -> insitu.Session:
        rank = len(self.nets)
        options: dict[str, Any] = {"rank": rank, "stage": rank, "max_rows": 16}
        session = insitu.attach(net, to=self._address, rules=rules or [], **options)
        self._stack.callback(session.close)
        self.sessions.append(session)
        self.nets.append(net)
        self.step(0)
        return session

    def step(self, step_id: int) -> None:
        with torch.inference_mode():
            for session, net in zip(self.sessions, self.nets, strict=True):
                with session.step(step_id, rows=[insitu.Rows("a", 0, 3, capture=True)]):
                    net(torch.full((3, 4), float(step_id)))
                assert session.flush().pending == 0

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def ranks(server: CollectorServer) -> Iterator[Ranks]:
    made = Ranks(server.address)
    made.add(nn.Sequential(nn.Identity()), [insitu.Rule(sites="output", rows="last")])
    made.add(nn.Sequential(nn.Identity(), nn.Identity()))
    yield made
    made.close()


def rules(server: CollectorServer, *args: str) -> Result:
    return CliRunner().invoke(command, ["rules", *args, "--at", f"127.0.0.1:{server.port}"])


def document(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["schema"] == "insitu.rules/1"
    run: dict[str, Any]
    (run,) = found["runs"]
    assert run["run"] == RUN
    return run


def test_ranks_show_the_rules_that_attach_was_given(server: CollectorServer, ranks: Ranks) -> None:
    result = rules(server, "show")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        f"run {RUN}: no rules handed down by the collector at 127.0.0.1:{server.port}",
        "rank 0 stage 0: version 0 (of attach): output,rows=last",
        "rank 1 stage 1: version 0 (of attach): no rule",
    ]


def test_rules_are_followed_from_the_next_step_and_recorded(server: CollectorServer, ranks: Ranks) -> None:
    run = document(rules(server, "set", "--rule", "1,rows=first:1", "--rule", "*,take=summary,every=1", "--json"))
    assert (run["version"], run["left_s"]) == (1, None)
    assert run["rules"] == ["1,rows=first:1", "*,take=summary,every=1"]
    assert [(rank["version"], rank["next_version"]) for rank in run["ranks"]] == [(0, 1), (0, 1)]
    assert "rank 0 stage 0: version 0 (of attach), 1 from its next step on: " in rules(server, "show").output
    ranks.step(1)
    run = document(rules(server, "show", "--json"))
    assert [(rank["rank"], rank["version"], rank["refused"]) for rank in run["ranks"]] == [(0, 1, None), (1, 1, None)]
    ranks.close()
    store = open_store(server.store)
    captures = store.table("captures").to_pylist()
    assert [(row["rank"], row["step_id"], row["row"]) for row in captures] == [(0, 0, 2), (1, 1, 0)]
    assert {row["rank"] for row in store.table("statistics").to_pylist()} == {0, 1}
    events = {(row["kind"], row["rank"]): row for row in store.table("events").to_pylist()}
    by = events["rules_set", -1]["text"]
    assert by.startswith(f"version 0 -> 1 of run {RUN} by ")
    assert by.endswith(": 1,rows=first:1; *,take=summary,every=1") and ", ipv4:127.0.0.1:" in by
    for rank in (0, 1):
        assert events["rules_in_force", rank]["step_id"] == 1
        assert events["rules_in_force", rank]["text"].startswith("version 1 by ")


def test_rules_for_a_time_are_given_to_a_rank_that_comes_later_too(server: CollectorServer, ranks: Ranks) -> None:
    rules(server, "set", "--rule", "*,rows=last")
    result = rules(server, "for", "60s", "--rule", "*,cast=bf16")
    assert result.exit_code == 0, result.output
    assert ": version 2 handed down by the collector at " in result.output and "0 s more" in result.output
    late = ranks.add(nn.Sequential(nn.Identity()))
    ranks.step(1)
    standing = late.rules()
    assert (standing.version, standing.rules) == (2, (insitu.Rule(sites="*", cast="bf16"),))
    assert standing.left_s is not None and 0 < standing.left_s <= 60
    document(rules(server, "set", "--none", "--json"))
    ranks.step(2)
    assert [(session.rules().version, session.rules().rules) for session in ranks.sessions] == [(3, ())] * 3


def test_a_rule_that_earlier_ones_hide_on_every_rank_is_a_warning_line(
    server: CollectorServer, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    hidden = "rule 2 (output,rows=last) takes nothing: earlier rules of its kind name all its sites"
    result = rules(server, "set", "--rule", "*", "--rule", "output,rows=last")
    assert (result.exit_code, result.stderr.splitlines()) == (0, [f"insitu: {hidden}"])
    assert caplog.messages.count(f"insitu: {hidden}") == 2, "each rank says so, as at attach"
    caplog.clear()
    result = rules(server, "set", "--rule", "0", "--rule", "[01]")
    assert (result.exit_code, result.stderr) == (0, ""), "rank 1 has a site of its own"
    assert len(caplog.messages) == 1, "rank 0 has not"
    ranks.sessions[0].set_rules([insitu.Rule(sites="*"), insitu.Rule(sites="output", rows="last")])
    assert caplog.messages[1:] == [f"insitu: {hidden}"], "and in the process itself"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["set", "--rule", "L9.mlp_out"], "Error: rule 1: no site matches 'L9.mlp_out'; the nearest are "),
        (["set", "--rule", "*,rows=first:17"], "Error: rank 0: rows='first:17' counts off more rows of a step"),
        (["set", "--rule", "*,cast=int4"], "Error: --rule '*,cast=int4': cast='int4' is not known; it may be "),
        (["set"], "Error: give --rule or --rules, or --none for no rule"),
        (["set", "--none", "--rule", "*"], "Error: give --rule or --rules, or --none for no rule"),
        (["for", "soon", "--rule", "*"], "Error: 'soon' is no length of time; write it like "),
        (["for", "none", "--rule", "*"], "Error: `none` is no time; "),
        (["for", "8d", "--rule", "*"], "Error: 691200 s is no time to follow rules for; it may be up to 7 days"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_changes(
    server: CollectorServer, ranks: Ranks, args: list[str], message: str
) -> None:
    result = rules(server, *args)
    assert (result.exit_code, result.output.count("\n")) == (2, 1), result.output
    assert result.output.startswith(message)
    ranks.step(1)
    assert [session.rules().version for session in ranks.sessions] == [0, 0]
    assert {row["kind"] for row in open_store(server.store).table("events").to_pylist()} == {"rows_untaken"}


def test_a_collector_without_ranks_says_so(server: CollectorServer) -> None:
    result = rules(server, "show")
    assert result.exit_code == 1
    assert result.output.startswith("Error: no rank is connected to this collector; rules are for models attached with")


def test_a_collector_that_is_not_there_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_TO", "grpc://127.0.0.1:1")
    result = CliRunner().invoke(command, ["rules", "show"])
    assert result.exit_code == 4
    assert result.output == (
        "Error: no collector answers at 127.0.0.1:1; say where it is with --at, or start one: "
        "insitu collect --store DIR\n"
    )
    assert (
        "has no port; the usual one is there:4317"
        in CliRunner().invoke(command, ["rules", "show", "--at", "there"]).output
    )


class Context:
    """What gRPC tells of a caller."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise PermissionError(code, text)


@pytest.mark.parametrize("peer", ["ipv4:10.0.0.7:4711", "ipv6:%5B2001:db8::1%5D:4711", "ipv4:12.7.0.0:1", ""])
def test_callers_on_another_host_are_turned_away(server: CollectorServer, ranks: Ranks, peer: str) -> None:
    with pytest.raises(PermissionError, match="own host; run `insitu rules` there"):
        server.ShowRules(RulesQuery(), Context(peer))
    with pytest.raises(PermissionError, match="own host"):
        server.SetRules(RulesOrder(), Context(peer))
    assert len(server.ShowRules(RulesQuery(), Context("ipv6:%5B::1%5D:4711")).runs) == 1
