"""The gate alone: who a call is from, and what ends when the tokens file changes. Clocks are the test's."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from insitu_collector.access.gate import LOOK_S, Access, Gate, Role
from insitu_collector.access.token_file import append_entry
from insitu_collector.access.tokens import Entry, digest_of

TOKEN = "insitu_" + "t" * 43
SHIP = frozenset({Role.SHIP})


class Ended(Exception):
    """A call was ended with this status."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code = code


class Call:
    """What the gate asks of a call."""

    def __init__(
        self,
        token: str | None = None,
        names: dict[str, list[bytes]] | None = None,
        peer: str = "ipv4:10.0.0.7:5",
        header: str | None = None,
    ) -> None:
        value = header if header is not None else None if token is None else f"Bearer {token}"
        self._metadata = [("user-agent", "x")] + ([("authorization", value)] if value is not None else [])
        self._names = names
        self._peer = peer

    def peer(self) -> str:
        return self._peer

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return {} if self._names is None else {"transport_security_type": [b"ssl"], **self._names}

    def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise Ended(code, text)


class Told(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


class Rig:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokens.toml"
        self.now, self.unix = 100.0, 1e9
        self.told = Told()

    def add(self, name: str = "rank-0", token: str = TOKEN, roles: frozenset[Role] = SHIP, **more: object) -> None:
        known_by = {} if "san" in more else {"sha256": digest_of(token)}
        append_entry(self.path, Entry(name, roles, **known_by, **more))  # type: ignore[arg-type]

    def gate(self) -> Gate:
        return Gate(Access(tokens=self.path), self.told, lambda: self.now, lambda: self.unix)

    def later(self, gate: Gate) -> None:
        self.now += LOOK_S
        gate.look()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_token_says_name_tenant_and_roles(rig: Rig) -> None:
    rig.add(tenant="team-a")
    caller = rig.gate().caller(Call(TOKEN))
    assert (caller.name, caller.tenant, caller.roles) == ("rank-0", "team-a", SHIP)
    assert str(caller) == "rank-0 at ipv4:10.0.0.7:5"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call(), "no token came"),
        (Call(peer="ipv4:127.0.0.1:5"), "no token came"),
        (Call("x"), "none of this collector's"),
        (Call(""), "none of this collector's"),
        (Call(header=f"Basic {TOKEN}"), "none of this collector's"),
        (Call(TOKEN.upper()), "none of this collector's"),
        (Call(names={"peer_dns": [b"other.example.com"]}), "no entry of the tokens file has `san` = other.example.com"),
        (Call("x", names={"peer_dns": [b"agent.example.com"]}), "none of this collector's"),
        (Call(names={"x509_common_name": [b"agent.example.com"]}), "no token came"),
        (Call(names={"peer_email": [b"agent.example.com"]}), "no token came"),
    ],
)
def test_nobody_else_is_let_in(rig: Rig, call: Call, said: str) -> None:
    rig.add()
    rig.add("agent", san="agent.example.com")
    with pytest.raises(Ended, match=f"UNAUTHENTICATED: .*{said}"):
        rig.gate().caller(call)


@pytest.mark.parametrize("key", ["peer_dns", "peer_uri"])
def test_a_name_of_a_certificate_lets_in(rig: Rig, key: str) -> None:
    rig.add("agent", san="agent.example.com", tenant="t")
    names = {key: [b"first.example.com", b"agent.example.com"]}
    assert rig.gate().caller(Call(names=names)).name == "agent"


def test_a_role_that_is_missing_names_the_entry(rig: Rig) -> None:
    rig.add()
    gate = rig.gate()
    with pytest.raises(Ended, match="PERMISSION_DENIED: rank-0 has not the role admin; add it"):
        gate.require(Call(TOKEN), Role.ADMIN, "not this text")
    rig.later(gate)
    assert rig.told == ["refused 1 of rank-0: role"]


def test_without_a_file_this_host_may_do_all_and_others_ship() -> None:
    gate = Gate()
    assert gate.require(Call(peer="ipv6:%5B::1%5D:4711"), Role.ADMIN, "").roles == frozenset(Role)
    assert gate.require(Call("a token, though none is asked for"), Role.SHIP, "").tenant == ""
    with pytest.raises(Ended, match="PERMISSION_DENIED: only here"):
        gate.require(Call(), Role.READ, "only here")


def test_a_child_is_let_in_by_a_token_that_is_in_no_file(rig: Rig) -> None:
    rig.add()
    gate = rig.gate()
    caller = gate.caller(Call(gate.child_token("judge", Role.SHIP)))
    assert (caller.name, caller.roles) == ("judge", SHIP)
    assert "judge" not in rig.path.read_text()


def test_an_entry_that_is_over_lets_nobody_in_and_ends_its_streams(rig: Rig) -> None:
    rig.add(expires=datetime.fromtimestamp(rig.unix + 60, UTC))
    gate, ended = rig.gate(), []
    with gate.watched(gate.caller(Call(TOKEN)), lambda: ended.append(1)):
        rig.later(gate)
        assert ended == []
        rig.unix += 60
        rig.later(gate)
        rig.later(gate)
        assert ended == [1], "once"
    with pytest.raises(Ended, match="entry rank-0 of the tokens file has expired"):
        gate.caller(Call(TOKEN))
    rig.later(gate)
    assert "refused 1 of rank-0: revoked" in rig.told


def test_what_changes_in_the_file_holds_from_the_next_look_on(rig: Rig) -> None:
    rig.add("stays", "x")
    rig.add()
    gate, ended = rig.gate(), []
    stays, goes = gate.caller(Call("x")), gate.caller(Call(TOKEN))
    with gate.watched(stays, lambda: ended.append("stays")), gate.watched(goes, lambda: ended.append("goes")):
        first = rig.path.read_text().split("\n\n")[0]
        rig.path.write_text(first + "\n")
        gate.look()
        rig.later(gate)
        assert ended == ["goes"]
    with pytest.raises(Ended):
        gate.caller(Call(TOKEN))
    assert rig.told[0] == f"tokens file {rig.path} changed: removed rank-0"


def test_a_stream_that_began_while_its_entry_went_ends(rig: Rig) -> None:
    rig.add()
    gate, ended = rig.gate(), []
    caller = gate.caller(Call(TOKEN))
    rig.path.write_text("")
    rig.later(gate)
    with gate.watched(caller, lambda: ended.append(1)):
        assert ended == [1]


@pytest.mark.parametrize("harm", ["text", "mode", "gone"])
def test_a_file_that_cannot_be_used_leaves_the_old_entries_and_is_said_once(rig: Rig, harm: str) -> None:
    rig.add()
    gate, before = rig.gate(), rig.path.read_text()
    if harm == "text":
        rig.path.write_text("[[token")
    elif harm == "mode":
        rig.path.chmod(0o644)
    else:
        rig.path.unlink()
    for _ in range(3):
        rig.later(gate)
        assert gate.caller(Call(TOKEN)).name == "rank-0"
    (said,) = rig.told
    assert said.startswith(f"tokens not changed, the old ones hold: tokens file {rig.path}")
    rig.path.write_text(before)
    rig.path.chmod(0o600)
    rig.add("second", "y")
    rig.later(gate)
    assert gate.caller(Call("y")).name == "second"
    assert rig.told[1:] == [f"tokens file {rig.path} changed: added second"]
