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
from test_otlp_payloads import request_of

from insitu.cli import insitu as command
from insitu_collector.subscriber.dead import BadLetter, DeadLetters, letters, read
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


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(command, ["store", "dead", *words])
    assert result.exit_code == code, result.output
    return result.output
