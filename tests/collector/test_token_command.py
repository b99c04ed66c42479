"""`insitu token`: a token is printed once and is in no file; what is asked for wrongly is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from insitu.cli import insitu as command
from insitu_collector.access.roles import Role
from insitu_collector.access.token_file import read_tokens
from insitu_collector.access.tokens import digest_of


def token(*args: str) -> Result:
    return CliRunner().invoke(command, ["token", *args])


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INSITU_TOKENS", str(tmp_path / "tokens.toml"))
    return tmp_path / "tokens.toml"


def test_a_new_token_is_all_that_stdout_has(path: Path) -> None:
    ran = token("new", "rank-0", "--role", "ship", "--role", "read", "--tenant", "team-a", "--expires", "90d")
    assert ran.exit_code == 0, ran.output
    (line,) = ran.stdout.splitlines()
    (entry,) = read_tokens(path)
    assert (entry.name, entry.tenant, entry.roles) == ("rank-0", "team-a", frozenset({Role.SHIP, Role.READ}))
    assert entry.sha256 == digest_of(line) and line not in path.read_text()
    assert entry.expires is not None
    assert f"rank-0 is in {path}" in ran.stderr


def test_a_certificate_needs_no_token(path: Path) -> None:
    ran = token("new", "agent", "--role", "ship", "--san", "spiffe://x/y")
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert read_tokens(path)[0].san == "spiffe://x/y"


def test_the_list_says_who_may_what(path: Path) -> None:
    made = token("new", "rank-0", "--role", "ship", "--tenant", "team-a").stdout.strip()
    token("new", "ops", "--role", "admin", "--san", "ops.example.com", "--expires", "1d")
    ran = token("list")
    assert [line.split()[:2] for line in ran.stdout.splitlines()] == [["rank-0", "ship"], ["ops", "admin"]]
    found = json.loads(token("list", "--json").stdout)
    assert (found["schema"], found["tokens"]) == ("insitu.tokens/1", str(path))
    first, second = found["entries"]
    assert first == {
        "name": "rank-0",
        "roles": ["ship"],
        "tenant": "team-a",
        "expires": None,
        "expired": False,
        "san": None,
    }
    assert (second["san"], second["expired"]) == ("ops.example.com", False)
    for shown in (ran.output, json.dumps(found)):
        assert made not in shown and digest_of(made) not in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("a/b", "--role", "ship"), "NAME is to be letters"),
        (("a", "--role", "ship", "--tenant", "Ä"), "--tenant is to be a-z"),
        (("a", "--role", "ship", "--expires", "soon"), "--expires: 'soon' is no "),
        (("a", "--role", "ship", "--expires", "none"), "--expires none is the default"),
        (("taken", "--role", "ship"), "has an entry taken"),
        (("a", "--role", "ship", "--san", 'x"y'), "--san is to be a URI or a DNS name"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(path: Path, args: tuple[str, ...], said: str) -> None:
    token("new", "taken", "--role", "ship")
    before = path.read_bytes()
    ran = token("new", *args)
    assert (ran.exit_code, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert said in line
    assert path.read_bytes() == before


def test_without_a_file_it_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INSITU_TOKENS", raising=False)
    ran = token("list")
    assert (ran.exit_code, ran.stderr) == (2, "Error: which tokens file? give --tokens FILE, or set INSITU_TOKENS\n")
