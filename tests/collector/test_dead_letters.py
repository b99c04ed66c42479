"""Dead letters: kept whole, bounded, and safe from damage and from a full disk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner
from subscriber_kit import letters
from test_otlp_payloads import request_of

from insitu.cli import insitu as command
from insitu_collector.subscriber.dead import DeadLetters, read
from insitu_collector.subscriber.letter import BadLetter
from insitu_collector.subscriber.payloads import Payload, payload_of

TO = "http://127.0.0.1:4318"


def payload(number: int = 3) -> Payload:
    return payload_of("traces", request_of("traces", [[number]]).SerializeToString())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "v1").mkdir()
    return tmp_path


def test_a_letter_is_read_as_it_was_written(store: Path) -> None:
    assert DeadLetters(store, TO, unix_clock_ns=lambda: 7).put(payload(), "400", "no such field\n{") == 0
    ((path, letter),) = letters(store)
    assert (letter.to, letter.signal, letter.reason, letter.text) == (TO, "traces", "400", "no such field\n{")
    assert (letter.unix_ns, letter.num_items) == (7, 3)
    assert read(store, path) == (letter, payload())


@pytest.mark.parametrize("bound", ["max_letters", "max_bytes"])
def test_the_oldest_go_and_are_counted_where_there_are_too_many(store: Path, bound: str) -> None:
    clock = count(1)
    bounds = {bound: 3 if bound == "max_letters" else 3 * size_of_a_letter(store / "other")}
    dead = DeadLetters(store, TO, unix_clock_ns=lambda: next(clock), **bounds)
    assert [dead.put(payload(), "400", "") for _ in range(5)] == [0, 0, 0, 3, 3]
    assert [letter.unix_ns for _, letter in letters(store)] == [3, 4, 5]
    again = DeadLetters(store, TO, unix_clock_ns=lambda: next(clock), **bounds)
    assert again.put(payload(), "400", "") == 3, "those of an earlier process count"


def size_of_a_letter(store: Path) -> int:
    DeadLetters(store, TO, unix_clock_ns=lambda: 1).put(payload(), "400", "")
    ((path, _),) = letters(store)
    return path.stat().st_size


def test_a_letter_that_is_larger_than_all_of_the_room_is_kept_alone(store: Path) -> None:
    dead = DeadLetters(store, TO, max_bytes=10)
    dead.put(payload(50), "413", "")
    assert [letter.num_items for _, letter in letters(store)] == [50]


def test_a_letter_with_a_changed_byte_is_not_sent_again(store: Path) -> None:
    DeadLetters(store, TO).put(payload(), "400", "")
    ((path, _),) = letters(store)
    found = bytearray(path.read_bytes())
    found[-1] ^= 1
    path.write_bytes(found)
    with pytest.raises(BadLetter, match="is damaged"):
        read(store, path)


PUT = """
import os, signal, sys
from pathlib import Path
from insitu_collector.subscriber import dead
from insitu_collector.subscriber.payloads import Payload

letters = dead.DeadLetters(Path(sys.argv[1]), sys.argv[2])
letters.put(Payload("traces", sys.stdin.buffer.read(), 3), "400", "first")
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
letters.put(Payload("traces", b"", 1), "400", "second")
"""
"""A process that keeps one letter and is killed while it writes another."""


def test_letters_of_a_process_that_was_killed_are_anybodys_and_what_it_had_begun_goes(store: Path) -> None:
    put = subprocess.run([sys.executable, "-c", PUT, str(store), TO], input=payload().body, timeout=60)
    assert put.returncode == -signal.SIGKILL
    ((path, letter),) = letters(store, TO)
    assert (letter.text, read(store, path)[1]) == ("first", payload())
    assert len(list(path.parent.glob("*.draft"))) == 1
    DeadLetters(store, TO).put(payload(), "400", "third")
    assert [letter.text for _, letter in letters(store, TO)] == ["first", "third"]
    assert list(path.parent.glob("*.draft")) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b'{"schema": "insitu.dead/2"}\n', b"\xff\n"])
def test_a_file_that_is_no_letter_is_left_out(store: Path, content: bytes) -> None:
    DeadLetters(store, TO).put(payload(), "400", "")
    ((path, _),) = letters(store)
    (path.parent / "0-0-0.letter").write_bytes(content)
    assert [found for found, _ in letters(store)] == [path]


def test_letters_are_listed_shown_and_dropped_by_command(store: Path) -> None:
    clock = count(1_785_585_600_000_000_000)
    dead = DeadLetters(store, TO, unix_clock_ns=lambda: next(clock))
    for reason in ("400", "404"):
        dead.put(payload(), reason, "no")
    listed = run("ls", str(store)).splitlines()
    assert [line.split("  ", 1)[1] for line in listed] == [
        f"2026-08-01T12:00:00Z  3 spans ({len(payload().body)} B) for {TO}: {reason} no" for reason in ("400", "404")
    ]
    names = [line.split()[0] for line in listed]
    document = json.loads(run("ls", str(store), "--json"))
    assert [letter["name"] for letter in document["letters"]] == names
    shown = json.loads(run("show", str(store), names[1]))
    assert (shown["reason"], shown["num_items"]) == ("404", 3)
    assert len(shown["request"]["resourceSpans"][0]["scopeSpans"][0]["spans"]) == 3
    assert run("drop", str(store), names[0]) == "1 dead letters were removed\n"
    assert "has no dead letter" in run("drop", str(store), names[0], "x", code=1)
    assert [letter.name for _, letter in letters(store)] == names[1:]
    assert run("drop", str(store), "--all") == "1 dead letters were removed\n"
    assert "has no dead letters" in run("ls", str(store)) + run("show", str(store))


HEADS = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[]\n",
    "no UTF-8": b"\xff\n",
    "another signal": b'{"schema": "insitu.dead/1", "to": "", "signal": "tracez", "reason": "", "text": "", '
    b'"unix_ns": 1, "num_items": 1, "num_bytes": 0, "crc32": 0, "of": null}\n',
    "a signal that is none": b'{"schema": "insitu.dead/1", "to": "", "signal": {}, "reason": "", "text": "", '
    b'"unix_ns": 1, "num_items": 1, "num_bytes": 0, "crc32": 0, "of": null}\n',
    "a text that is none": b'{"schema": "insitu.dead/1", "to": "", "signal": "traces", "reason": "", "text": 1, '
    b'"unix_ns": 1, "num_items": 1, "num_bytes": 0, "crc32": 0, "of": null}\n',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", HEADS.values(), ids=HEADS)
def test_a_letter_whose_head_is_damaged_is_listed_shown_and_dropped_as_such(store: Path, content: bytes) -> None:
    DeadLetters(store, TO).put(payload(), "400", "")
    ((path, whole),) = letters(store)
    damaged = path.with_name("0-0-0.letter")
    damaged.write_bytes(content)
    lines = run("ls", str(store), "--of", TO).splitlines()
    assert lines[0] == f"0-0-0  damaged ({len(content)} B): its first line is no head of a letter"
    assert [line.split()[0] for line in lines] == ["0-0-0", whole.name]
    document = json.loads(run("ls", str(store), "--json"))
    assert [letter["name"] for letter in document["letters"]] == [whole.name]
    assert document["damaged"] == [
        {"name": "0-0-0", "num_bytes": len(content), "text": "its first line is no head of a letter"}
    ]
    assert json.loads(run("show", str(store)))["name"] == whole.name, "the oldest that can be shown"
    assert run("show", str(store), "0-0-0", code=1) == (
        "Error: 0-0-0 is damaged: its first line is no head of a letter; "
        f"`insitu store dead drop {store} 0-0-0` removes it\n"
    )
    assert run("drop", str(store), "0-0-0") == "1 dead letters were removed\n"
    assert [path] == [found for found, _ in letters(store)] == list(path.parent.glob("*.letter"))


def test_a_letter_whose_request_is_damaged_or_of_another_version_is_listed_as_such(store: Path) -> None:
    DeadLetters(store, TO, unix_clock_ns=lambda: 1).put(payload(), "400", "")
    ((path, letter),) = letters(store)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    path.with_name("0-0-0.letter").write_bytes(content.replace(b"insitu.dead/1", b"insitu.dead/2"))
    assert run("ls", str(store)).splitlines() == [
        f"0-0-0  damaged ({len(content)} B): it is of another version",
        f"{letter.name}  damaged ({len(content) - 1} B): its bytes are not those that were written",
    ]
    assert "is damaged: it is of another version; " in run("show", str(store), code=1)
    assert run("drop", str(store), "--all", "--of", TO) == "2 dead letters were removed\n"
    assert list(path.parent.glob("*.letter")) == []


def test_a_damaged_letter_counts_against_the_bounds(store: Path) -> None:
    clock = count(1)
    DeadLetters(store, TO, unix_clock_ns=lambda: next(clock)).put(payload(), "400", "")
    ((path, _),) = letters(store)
    path.write_bytes(b"{")
    dead = DeadLetters(store, TO, unix_clock_ns=lambda: next(clock), max_letters=2)
    assert [dead.put(payload(), "400", "") for _ in range(3)] == [0, 0, 3], "nobody knows how many items it had"
    assert not path.exists()


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(command, ["store", "dead", *words])
    assert result.exit_code == code, result.output
    return result.output
