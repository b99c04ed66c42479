"""What the verbs are given and cannot use is one line at the call, a ValueError, and the model is as it was."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_kit import read_only
from torch import nn

import insitu
from insitu.arguments import ARGUMENTS
from insitu.config import ConfigError
from insitu.testing import Recording

NUMBERS: list[dict[str, Any]] = [{"rank": value} for value in ("a", 10**9, -5, -1, 1.5, True)]
NUMBERS += [{"stage": "x"}, {"stage": 2**15}, {"replica": -1}, {"tp_rank": "a"}, {"role": "chief"}]
FIELDS: list[dict[str, Any]] = [{"epoch": value} for value in (-1, "x", 2**64, 1.5, None)]
FIELDS += [{"run": value} for value in ("x", 5, None, "0" * 15)] + [{"pid": value} for value in (10**30, -1, "a")]
FIELDS += [{"host": value} for value in (5, None, "\ud800")] + [{"boot_id": 5}, {"version": 5}, {"config_digest": 5}]
FIELDS += [{"unix_anchor_ns": 2**63}, {"mono_anchor_ns": "a"}, {"dp_rank": 2**15}, {"ep_rank": None}]
RULE = insitu.Rule(sites="*")
SETTINGS: list[dict[str, Any]] = [
    {"axes": {"*": "bogus"}},
    {"axes": {3: "tokens"}},
    {"axes": 3},
    {"max_rows": 0},
    {"max_rows": []},
    {"flight": 3},
    {"rules": "abc"},
    {"rules": [3]},
    {"rules": RULE},
    {"rules": None},
    {"no_such": 3},
    {"spool": 3},
    {"spool": ""},
    {"spool": "a\0b"},
    {"to": "grpc://h:99999"},
    {"to": "grpc://h:0"},
    {"to": "otlp://h:bad"},
    {"to": "otlp://h:99999"},
]


@pytest.mark.parametrize("given", [*NUMBERS, *FIELDS, *SETTINGS, {"model_name": 5}], ids=ascii)
def test_attach_says_in_a_line_what_it_cannot_use(given: dict[str, Any], insitu_records: Recording) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=next(iter(given)) if "to" not in given else "h:") as raised:
        insitu.attach(model, **{"to": insitu_records, **given})
    assert "\n" not in str(raised.value)
    assert type(model) is nn.Linear
    with insitu.attach(model, to=insitu_records):
        model(torch.ones(1, 2))
    assert len(insitu_records.rows("steps")) == 1


@pytest.mark.parametrize("given", [*NUMBERS, *FIELDS, {"model": 5}, {"param_bytes": -1}], ids=ascii)
def test_start_says_it_too(given: dict[str, Any], insitu_records: Recording) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        insitu.start(to=insitu_records, **{"rank": 0, **given})


def test_fields_of_the_source_at_the_ends_of_their_ranges_are_recorded(insitu_records: Recording) -> None:
    given: dict[str, Any] = {"epoch": 2**64 - 1, "run": "0123456789abcdef", "host": "", "pid": 2**31 - 1}
    given |= {
        "boot_id": "b",
        "version": "\u00e9",
        "config_digest": None,
        "unix_anchor_ns": 0,
        "mono_anchor_ns": 2**63 - 1,
    }
    given |= {"mono_anchor_ns": 2**63 - 1, "replica": 2**15 - 1, "tp_rank": np.int64(3)}
    insitu.attach(nn.Linear(2, 2), to=insitu_records, **given).close()
    (row,) = insitu_records.rows("sources")
    assert {name: row[name] for name in given} == given


@pytest.mark.parametrize(("name", "value"), [("plan_digest", "x"), ("param_bytes", 5)])
def test_what_attach_finds_out_itself_is_not_offered_and_refused(
    name: str, value: Any, insitu_records: Recording
) -> None:
    taken: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"^{name}: insitu finds it out from the model; leave it out$"):
        insitu.attach(nn.Linear(2, 2), to=insitu_records, **taken)
    with pytest.raises(ConfigError, match="fields of the source are ") as raised:
        insitu.attach(nn.Linear(2, 2), to=insitu_records, rnk=1)
    offered = str(raised.value).partition("fields of the source are ")[2].split(", ")
    assert not {name, "model"} & set(offered) and "host" in offered
    insitu.start(to=insitu_records, **taken).close()
    assert insitu_records.rows("sources")[0][name] == value


@pytest.mark.parametrize(("model", "said"), [(None, "None is no model"), (nn.Linear, "Linear is a class")])
def test_what_is_no_model_is_named(model: Any, said: str, insitu_records: Recording) -> None:
    with pytest.raises(ValueError, match=said):
        insitu.attach(model, to=insitu_records)


def test_a_run_that_is_none_is_named(insitu_records: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_RUN", "zz")
    with pytest.raises(ValueError, match="INSITU_RUN: 'zz' is no run; write 16 hex digits"):
        insitu.attach(nn.Linear(2, 2), to=insitu_records)


def test_a_file_is_no_store_and_the_remedy_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match="is a file; name a folder"):
        insitu.attach(nn.Linear(2, 2), to=f"file://{tmp_path / 'a'}")


@pytest.mark.parametrize(
    "fields",
    [
        *({"start": value} for value in (-1, 2**31, 2**70, 1.5, "a")),
        *({"count": value} for value in (-1, 2**40, "a", None)),
        *({"sample_row": value} for value in (-2, 2**40, "a")),
        *({"position": value} for value in (2**70, -(2**63), "a", 0.5)),
        *({"request": value} for value in (7, None, b"r", "\ud800", "")),
        *({"capture": value} for value in ("rows", "no", None, 2, np.zeros(2))),
        {"trace": "abc"},
    ],
    ids=ascii,
)
def test_rows_that_cannot_be_are_refused_where_they_are_stated(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))) as raised:
        insitu.Rows(**{"request": "a", "start": 0, "count": 1, **fields})
    assert "\n" not in str(raised.value)


def test_rows_of_other_whole_numbers_are_kept_as_ints_and_any_unicode_is_a_name() -> None:
    start: Any = np.int32(1)
    position: Any = np.int64(3)
    capture: Any = np.True_
    rows = insitu.Rows("r\u00e9\U0001f600", start, 2, position, capture=capture)
    assert rows.capture is True
    assert [type(number) for number in (rows.start, rows.count, rows.position)] == [int] * 3


STEPS: list[dict[str, Any]] = [{"step_id": value} for value in ("a", 1.5, 2**63, -(2**63), 2**70)]
STEPS += [{"mb": value} for value in ("a", 2**15, 2**40, None)]
STEPS += [{"num_rows": value} for value in ("a", -1, 2**70)] + [{"num_padded": value} for value in ("a", -1, 2**31)]


@pytest.mark.parametrize("given", STEPS, ids=str)
def test_a_step_that_cannot_be_is_refused_at_the_call_and_the_next_is_recorded(
    given: dict[str, Any], insitu_records: Recording
) -> None:
    model = nn.Linear(2, 2)
    with insitu.attach(model, to=insitu_records) as session:
        with pytest.raises(ValueError, match=next(iter(given))) as raised:
            session.step(**given)
        assert "\n" not in str(raised.value)
        model(torch.ones(1, 2))
        assert session.stats().probe_errors == 0
    assert [row["step_id"] for row in insitu_records.rows("steps")] == [0]


def test_a_phase_that_is_none_is_refused_in_a_row_of_a_step_that_states_one(insitu_records: Recording) -> None:
    with (
        insitu.attach(nn.Linear(2, 2), to=insitu_records) as session,
        pytest.raises(KeyError, match="'q' is no phase"),
    ):
        session.step(phase="decode", rows=[insitu.Rows("a", 0, 1, phase="q")])


def test_a_session_says_what_it_cannot_use_and_goes_on(insitu_records: Recording) -> None:
    model = nn.Linear(2, 2)
    with insitu.attach(model, to=insitu_records) as session:
        wrong: Any = "abc"
        for call in (
            lambda: session.step(wrong),
            lambda: session.step(rows=wrong),
            lambda: session.step(rows=[wrong]),
            lambda: session.set_rules(wrong),
            lambda: session.event(wrong, wrong, step_id=wrong),
            lambda: session.event("k", 3),  # type: ignore[arg-type]
        ):
            with pytest.raises(ValueError, match=r"abc|texts"):
                call()
        model(torch.ones(1, 2))
        assert session.stats().probe_errors == 0
    assert [row["step_id"] for row in insitu_records.rows("steps")] == [0]


REQUEST = {"request": "r", "t_ns": 1, "step_id": -1}


def event_with(**fields: Any) -> dict[str, Any]:
    return {"t_ns": 1, "kind": "k", "step_id": -1, "text": "", **fields}


WRONG: list[tuple[str, Callable[[insitu.Session, Any], Any], list[Any]]] = [
    ("why", lambda session, value: session.dump(value), [5, None, b"x", "\ud800"]),
    ("request", lambda session, value: session.request("arrived", value), [5, None, "\ud800", ""]),
    ("request", lambda session, value: session.requests(value).__enter__(), [["a", ""], ["\ud800"]]),
    ("capture", lambda session, value: session.requests(["a"], capture=value).__enter__(), ["rows", None]),
    ("step_id", lambda session, value: session.request("arrived", "r", step_id=value), ["a", 2**63]),
    ("num_tokens", lambda session, value: session.request("arrived", "r", num_tokens=value), ["a", 2**40]),
    ("t_ns", lambda session, value: session.request("arrived", "r", t_ns=value), ["a", 2**70]),
    ("trace", lambda session, value: session.request("arrived", "r", trace=value), ["abc", 5]),
    ("trace_id", lambda session, value: session.request("arrived", "r", trace_id=value), [5, "\ud800"]),
    ("text", lambda session, value: session.event("k", value), ["\ud800"]),
    ("kind", lambda session, value: session.event(value, ""), ["\ud800"]),
    ("step_id", lambda session, value: session.event("k", step_id=value), ["a", 2**63]),
    ("peer", lambda session, value: session.interval("idle", peer=value), ["a", 2**70, 2**15]),
    ("mb", lambda session, value: session.interval("idle", mb=value), ["a", 2**15]),
    ("num_bytes", lambda session, value: session.interval("idle", num_bytes=value), ["a", 2**70]),
    ("step_id", lambda session, value: session.interval("idle", step_id=value), ["a", 2**63]),
    ("timeout_s", lambda session, value: session.flush(value), ["a", None, float("nan"), 10**400]),
    ("timeout_s", lambda session, value: session.collect([], timeout_s=value), ["a"]),
    ("inputs", lambda session, value: session.collect(value), [5, None]),
    ("for_s", lambda session, value: session.set_rules([], for_s=value), ["a"]),
    ("who", lambda session, value: session.set_rules([RULE], who=value), [5, None, "\ud800"]),
    ("row", lambda session, value: session.append("events", value), [None, 5, "kind", [("kind", "k")]]),
    ("kind", lambda session, value: session.append("events", event_with(kind=value)), [5, b"\xff", "\ud800", ["k"]]),
    ("step_id", lambda session, value: session.append("events", event_with(step_id=value)), ["a", 2**63]),
    ("event", lambda session, value: session.append("requests", {**REQUEST, "event": value}), [-1, 2**8, "a"]),
]


@pytest.mark.parametrize(("name", "call", "values"), WRONG, ids=[each[0] for each in WRONG])
def test_what_a_verb_cannot_use_is_refused_at_the_call_and_the_session_goes_on(
    name: str, call: Callable[[insitu.Session, Any], Any], values: list[Any], insitu_records: Recording
) -> None:
    model = nn.Linear(2, 2)
    with insitu.attach(model, to=insitu_records) as session:
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: ") as raised:
                call(session, value)
            assert "\n" not in str(raised.value)
        model(torch.ones(1, 2))
        assert session.stats().probe_errors == 0
    assert not [kind for kind in ("events", "requests", "incidents") if insitu_records.rows(kind)]
    assert session.stats().dropped == {}


def test_an_endless_flush_ends_when_all_is_durable(insitu_records: Recording) -> None:
    with insitu.start(to=insitu_records) as session:
        session.event("k")
        for timeout_s in (float("inf"), 1e300):
            assert session.flush(timeout_s).pending == 0
        session.append("events", event_with(t_ns=np.int64(3)))
        assert session.close(float("inf")).dropped == 0
    assert [row["kind"] for row in insitu_records.rows("events")] == ["k", "k"]


def test_bytes_of_the_environment_that_are_no_text_are_refused_with_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INSITU_TO", "file://./a\udcff")
    with pytest.raises(ConfigError, match=r"^INSITU_TO: 'file://\./a\\udcff' is no text; write a URL of Unicode"):
        insitu.attach(nn.Linear(2, 2))


@pytest.mark.parametrize("headers", [5, [1, 2], {1: 2}, [("a",)], "abc", {"traceparent": 5}, object])
def test_what_are_no_headers_is_no_context_and_raises_nothing(headers: Any) -> None:
    assert insitu.request_context(headers) == insitu.request_context()


@pytest.mark.parametrize("said", ["maybe", "2"])
def test_a_switch_that_says_neither_is_named(
    said: str, insitu_records: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSITU_DISABLED", said)
    with pytest.raises(ConfigError, match=f"INSITU_DISABLED: '{said}' is no switch; write 1 .* or 0"):
        insitu.attach(nn.Linear(2, 2), to=insitu_records)


@pytest.mark.parametrize("said", ["0", "off", "No", ""])
def test_a_switch_that_is_off_is_off(said: str, insitu_records: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_DISABLED", said)
    model = nn.Linear(2, 2)
    with insitu.attach(model, to=insitu_records):
        model(torch.ones(1, 2))
    assert insitu_records.rows("steps")


def test_a_folder_that_is_none_or_cannot_be_made_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="destination 'file://' names no folder; write one like"):
        insitu.attach(nn.Linear(2, 2), to="file://")
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match="a/store cannot be written: not a directory; name a folder") as raised:
        insitu.attach(nn.Linear(2, 2), to=f"file://{tmp_path / 'a' / 'store'}")
    assert "\n" not in str(raised.value)


NOBODY = "grpc://127.0.0.1:1"


@pytest.mark.parametrize(
    ("spool", "said"),
    [
        ("file", "{0} is a file; name a folder, which is made where there is none"),
        ("file/spool", "{0} cannot be written: not a directory; name a folder that you may write to"),
        ("x" * 300, "cannot be written: file name too long; name a folder that you may write to"),
    ],
    ids=["a file", "under a file", "too long"],
)
def test_a_spool_that_can_be_no_folder_is_named_with_the_remedy(spool: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, path = nn.Linear(2, 2), str(tmp_path / spool)
    calls: list[Callable[[], insitu.Session]] = [
        lambda: insitu.attach(model, to=NOBODY, spool=path),
        lambda: insitu.start(to=NOBODY, spool=path),
    ]
    for call in calls:
        with pytest.raises(OSError, match=f"^spool .*{said.format(path)}") as raised:
            call()
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert "forward" not in vars(model)


@pytest.mark.parametrize("spool", [".", "new"])
def test_a_spool_that_may_not_be_written_is_refused_before_rows_wait_for_it(spool: str, tmp_path: Path) -> None:
    path = tmp_path / spool
    with read_only(tmp_path), pytest.raises(OSError, match=r"^spool .* cannot be written: read-only file system; name"):
        insitu.attach(nn.Linear(2, 2), to=NOBODY, spool=str(path))
    with insitu.attach(nn.Linear(2, 2), to=NOBODY, spool=str(path)):
        assert path.is_dir()


def test_a_store_that_may_not_be_written_is_refused_too(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(OSError, match=r"^destination .* cannot be written: read-only file system"):
        insitu.attach(nn.Linear(2, 2), to=f"file://{tmp_path}")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("keep_bytes", "the variable INSITU_KEEP_BYTES sets it"),
        ("hots", "'host' may be meant; help(insitu.attach) has the list"),
        ("flihgt", "'flight' may be meant; help(insitu.attach) has the list"),
        ("keep_byte", "'keep_bytes' may be meant; the variable INSITU_KEEP_BYTES sets it"),
        ("odd", "help(insitu.attach) has the list"),
    ],
)
def test_an_argument_that_there_is_not_is_answered_with_what_there_is(name: str, remedy: str) -> None:
    wrong: dict[str, Any] = {name: "x"}
    with pytest.raises(ConfigError, match=re.escape(f"there is no argument '{name}'; {remedy}")):
        insitu.attach(nn.Linear(2, 2), to="memory://arguments", **wrong)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("axes", "insitu.attach takes it, which has a model to observe"),
        ("max_row", "'max_rows' may be meant; insitu.attach takes it"),
        ("modl", "'model' may be meant; help(insitu.start) has the list"),
        ("disabled", "the variable INSITU_DISABLED sets it"),
    ],
)
def test_of_start_only_what_it_takes_is_offered(name: str, remedy: str) -> None:
    wrong: dict[str, Any] = {name: "x"}
    with pytest.raises(ConfigError, match=re.escape(f"there is no argument '{name}'; {remedy}")):
        insitu.start(to="memory://arguments", **wrong)


def test_what_is_offered_is_what_the_verbs_take() -> None:
    for verb, taken in ((insitu.attach, {"model", "source"}), (insitu.start, {"source"})):
        assert set(ARGUMENTS[verb.__name__]) == set(inspect.signature(verb).parameters) - taken


@pytest.mark.parametrize("model", [None, "gpt2", nn.Linear])
def test_what_is_no_model_is_refused_before_anything_is_said_of_records(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("insitu.settled._said", set())
    monkeypatch.delenv("INSITU_TO", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"is no model|is a class"):
        insitu.attach(model)
    with pytest.raises(ConfigError, match="there is no argument"):
        insitu.start(odd=1)
    assert not caplog.messages and not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["argument", "variable"])
@pytest.mark.parametrize("to", ["memory://spooled", "file://{}/store", Recording()], ids=["memory", "file", "own"])
def test_a_spool_beside_what_is_no_collector_is_said_once_to_have_no_effect(
    way: str, to: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("insitu.settled._said", set())
    monkeypatch.delenv("INSITU_SPOOL", raising=False)
    to = to.format(tmp_path) if isinstance(to, str) else to
    spool = str(tmp_path / "spool")
    if way == "variable":
        monkeypatch.setenv("INSITU_SPOOL", spool)
    for _ in range(2):
        insitu.start(to=to, spool=spool if way == "argument" else None).close()
    named = {"argument": "spool=", "variable": "INSITU_SPOOL"}[way]
    where = to if isinstance(to, str) else "an Exporter of your own"
    assert caplog.messages == [
        f"insitu: {named} has no effect: a spool holds what a grpc:// collector that is away cannot take, and records "
        f"go to {where}"
    ]


def test_a_spool_beside_a_collector_is_said_nothing_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("insitu.settled._said", set())
    insitu.start(to="GRPC://127.0.0.1:1", spool=str(tmp_path / "spool")).close(0.1)
    assert not [line for line in caplog.messages if "no effect" in line]
