"""The tokens file on disk: a secret of its owner, read whole, appended to without harm."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from insitu_collector.access.roles import Role
from insitu_collector.access.token_file import MAX_BYTES, append_entry, read_tokens
from insitu_collector.access.tokens import BadTokens, Entry, digest_of


def entry(name: str) -> Entry:
    return Entry(name, frozenset({Role.SHIP}), sha256=digest_of(name))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def test_the_first_entry_makes_a_file_that_only_its_owner_reads(path: Path) -> None:
    os.umask(os.umask(0))
    append_entry(path, entry("a"))
    assert path.stat().st_mode & 0o777 == 0o600
    append_entry(path, entry("b"))
    assert read_tokens(path) == (entry("a"), entry("b"))


def test_what_people_wrote_into_it_stays(path: Path) -> None:
    path.write_text("# ours\n" + entry("a").toml() + "# no line's end")
    path.chmod(0o600)
    append_entry(path, entry("b"))
    assert path.read_text().startswith("# ours\n") and "# no line's end\n" in path.read_text()
    assert read_tokens(path) == (entry("a"), entry("b"))


def test_a_name_or_a_certificate_is_there_once(path: Path) -> None:
    append_entry(path, entry("a"))
    before = path.read_bytes()
    with pytest.raises(BadTokens, match="has an entry a; give another name"):
        append_entry(path, entry("a"))
    append_entry(path, Entry("b", frozenset({Role.SHIP}), san="x"))
    with pytest.raises(BadTokens, match="entries b and c have one san"):
        append_entry(path, Entry("c", frozenset({Role.SHIP}), san="x"))
    assert path.read_bytes().startswith(before) and len(read_tokens(path)) == 2


def test_those_who_append_at_once_lose_nothing(path: Path) -> None:
    names = [f"n{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: append_entry(path, entry(name)), names))
    assert {each.name for each in read_tokens(path)} == set(names)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_file_that_others_may_use_is_refused(path: Path, mode: int) -> None:
    append_entry(path, entry("a"))
    path.chmod(mode)
    said = f"tokens file {path} has mode {mode:04o}, so others may use it; chmod 600 {path}"
    with pytest.raises(BadTokens) as error:
        read_tokens(path)
    assert str(error.value) == said
    with pytest.raises(BadTokens, match="chmod 600"):
        append_entry(path, entry("b"))


def test_a_file_of_another_user_is_refused(path: Path) -> None:
    append_entry(path, entry("a"))
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 4711, -1)
    with pytest.raises(BadTokens, match="belongs to another user"):
        read_tokens(path)


def test_what_cannot_be_read_is_said_in_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadTokens, match=r"cannot be read: no such file or directory; `insitu token new` makes one"):
        read_tokens(path)
    with pytest.raises(BadTokens, match="cannot be read: is a directory"):
        read_tokens(tmp_path)
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(BadTokens, match=f"tokens file {path}: not UTF-8"):
        read_tokens(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(BadTokens, match="more than 4194304 bytes"):
        read_tokens(path)
    with pytest.raises(BadTokens, match="cannot be written: not a directory"):
        append_entry(path / "under", entry("a"))


def test_who_keeps_the_lock_stops_no_reader(path: Path) -> None:
    append_entry(path, entry("a"))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_tokens(path) == (entry("a"),)
