"""Each public name says what it takes, in which unit, and how it fails; it fails so; and the docs tell of it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import pytest
import torch
from torch import nn

import insitu
import insitu.exporters
import insitu.testing
from insitu.config import SETTINGS, ConfigError, load
from insitu.exporters import Refused, Retry
from insitu.flight.settings import FlightError
from insitu.rules.rule import RuleError
from insitu.testing import Recording
from insitu.vocabulary import DropReason

DOCS: Final = Path(__file__).parents[2] / "docs"
TOLD_IN: Final = ("probe.md", "extending.md")
MODULES: Final = {"insitu": insitu, "insitu.testing": insitu.testing, "insitu.exporters": insitu.exporters}
FIXTURES: Final = ("insitu_records", "insitu_clock", "insitu_oracle", "insitu_contains")
UNITS: Final = re.compile(r"\b(share|seconds|times|ns|bytes)\b", re.IGNORECASE)
WITHOUT_UNIT: Final = {("insitu.testing.origin_of", "value")}

Public = dict[str, Any]


def exported() -> Public:
    return {f"{place}.{name}": getattr(module, name) for place, module in MODULES.items() for name in module.__all__}


def methods_of(cls: type, place: str) -> Public:
    """Return the public methods and properties that a class has of its own."""
    own = vars(cls).items()
    return {
        f"{place}.{name}": thing
        for name, thing in own
        if not name.startswith("_") and isinstance(thing, FunctionType | property)
    }


def everything() -> Public:
    """Return every export, and the methods of those that a program of its own calls."""
    found = exported()
    classes = {name: thing for name, thing in found.items() if inspect.isclass(thing)}
    own = {name: cls for name, cls in classes.items() if name.startswith("insitu.") and name.count(".") == 1}
    for name, cls in own.items():
        found |= methods_of(cls, name)
    return found


PUBLIC: Final = everything()


def arguments_of(thing: Any) -> list[inspect.Parameter]:
    """Return what a caller names."""
    if not callable(thing) or (inspect.isclass(thing) and issubclass(thing, int)):
        return []
    of = thing.__init__ if inspect.isclass(thing) and not is_dataclass(thing) else thing
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(of).parameters.values()
    return [each for each in found if each.kind in kinds and each.name != "self"]


def words_of(thing: Any) -> str:
    """Return the docstring, for a class with that of `__init__`, and the strings below its fields."""
    words = [thing.__doc__ or ""]
    if inspect.isclass(thing):
        words.append(vars(thing).get("__init__", thing).__doc__ or "")
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                words.append(f"{ast.unparse(field.target)}: {below.value.value!s}")
    if thing is insitu.Config:
        words += [f"{setting.name}: {setting.help}" for setting in SETTINGS]
    return "\n".join(words)


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_a_docstring_of_its_own(name: str) -> None:
    text = PUBLIC[name].__doc__ or ""
    assert (text.strip() and text[0].isupper()) or text.startswith(("`", "A ")), text
    assert not re.match(rf"{name.rpartition('.')[2]}\(", text), "what dataclasses write is no docstring"


@pytest.mark.parametrize("name", [name for name in PUBLIC if arguments_of(PUBLIC[name])])
def test_its_docstring_names_each_argument_and_its_unit(name: str) -> None:
    text = words_of(PUBLIC[name])
    for argument in arguments_of(PUBLIC[name]):
        assert re.search(rf"\b{argument.name}\b", text), f"{name} says nothing of {argument.name}"
        says_it = argument.name.endswith(("_s", "_ns")) or (name, argument.name) in WITHOUT_UNIT
        if re.search(r"\bfloat\b", str(argument.annotation)) and not says_it:
            near = [text[found.start() :][:160] for found in re.finditer(rf"\b{argument.name}\b", text)]
            assert any(map(UNITS.search, near)), f"{name} says no unit of {argument.name}"
        if "Tensor" in str(argument.annotation):
            assert re.search(r"shape", text), f"{name} says no shape of {argument.name}"


@pytest.mark.parametrize("name", [name for name in PUBLIC if arguments_of(PUBLIC[name])])
def test_its_docstring_says_what_it_raises(name: str) -> None:
    thing = PUBLIC[name]
    if inspect.isclass(thing) and (issubclass(thing, Exception) or thing in CHECK_NOTHING):
        return
    assert re.search(r"\b[Rr]aises\b", words_of(thing)), f"{name} does not say how it fails"


CHECK_NOTHING: Final = (
    *(insitu.Rows, insitu.RequestContext, insitu.exporters.Ack, insitu.exporters.Batch),
    *(insitu.exporters.Exporter, insitu.testing.Origin),
)
"""Plain data: whoever is given it says what is wrong."""


# -- and it fails so -------------------------------------------------------------------------------------------------


def session() -> insitu.Session:
    return insitu.start(to=Recording())


def observed() -> insitu.Session:
    return insitu.attach(nn.Linear(2, 2), to=Recording())


def closing(make: Callable[[], insitu.Session], act: Callable[[insitu.Session], Any]) -> Callable[[], Any]:
    def run() -> None:
        with make() as opened:
            act(opened)

    return run


def entered() -> None:
    with insitu.start(to=Recording()), insitu.interval("lunch"):
        pass


def decorated() -> None:
    insitu.observe(to="nowhere://x")(lambda: nn.Linear(2, 2))()


BAD: Final[Sequence[tuple[str, type[BaseException], Callable[[], Any]]]] = (
    ("insitu.attach", ValueError, lambda: insitu.attach(nn.Linear(2, 2), to="nowhere://x")),
    ("insitu.attach", ValueError, lambda: insitu.attach(nn.Linear(2, 2), rules=[insitu.Rule(sites="nothing")])),
    ("insitu.attach", OSError, lambda: insitu.attach(nn.Linear(2, 2), to="file:///dev/null/store")),
    ("insitu.start", ValueError, lambda: insitu.start(stage=1)),
    ("insitu.start", OSError, lambda: insitu.start(to="file:///dev/null/store")),
    ("insitu.observe", ValueError, decorated),
    ("insitu.interval", KeyError, entered),
    ("insitu.Rule", RuleError, lambda: insitu.Rule(sites="")),
    ("insitu.Flight", FlightError, lambda: insitu.Flight(pre_s=-1)),
    ("insitu.Flight.row_bytes", FlightError, lambda: insitu.Flight(max_bytes="lots")),
    ("insitu.Rows", ValueError, lambda: insitu.Rows("one", -1, 1)),
    ("insitu.Rows", KeyError, closing(session, lambda s: s.step(rows=[insitu.Rows("one", 0, 1, phase="lunch")]))),
    ("insitu.Config", ConfigError, lambda: load(max_rows="none")),
    ("insitu.Session", ValueError, lambda: insitu.start(to="nowhere://x")),
    ("insitu.Session.step", ValueError, closing(session, lambda s: s.step("q"))),  # type: ignore[arg-type]
    ("insitu.Session.event", ValueError, closing(session, lambda s: s.event("k", 3))),  # type: ignore[arg-type]
    ("insitu.Session.dump", ValueError, closing(session, lambda s: s.dump(5))),  # type: ignore[arg-type]
    ("insitu.Session.flush", ValueError, closing(session, lambda s: s.flush("a"))),  # type: ignore[arg-type]
    ("insitu.Session.request", ValueError, closing(session, lambda s: s.request("arrived", 5))),  # type: ignore[arg-type]
    ("insitu.Session.interval", ValueError, closing(session, lambda s: s.interval("idle", peer=2**70))),
    ("insitu.Session.step", KeyError, closing(session, lambda s: s.step(phase="lunch"))),
    ("insitu.Session.interval", KeyError, closing(session, lambda s: s.interval("lunch"))),
    ("insitu.Session.request", KeyError, closing(session, lambda s: s.request("lost", "one"))),
    ("insitu.Session.append", KeyError, closing(session, lambda s: s.append("lost", {}))),
    ("insitu.Session.append", KeyError, closing(session, lambda s: s.append("events", {"lost": 1}))),
    ("insitu.Session.append", ValueError, closing(session, lambda s: s.append("verdicts", {}))),
    ("insitu.Session.set_rules", RuleError, closing(session, lambda s: s.set_rules([]))),
    ("insitu.Session.set_rules", RuleError, closing(observed, lambda s: s.set_rules([insitu.Rule(sites="lost")]))),
    ("insitu.Session.collect", ValueError, closing(session, lambda s: s.collect([1]))),
    ("insitu.Rows.phase_number", KeyError, lambda: insitu.Rows("one", 0, 1, phase="lunch").phase_number()),
    ("insitu.exporters.open_exporter", ValueError, lambda: insitu.exporters.open_exporter("nowhere://x", source())),
    ("insitu.exporters.open_exporter", OSError, lambda: insitu.exporters.open_exporter("file:///dev/null/x", source())),
    ("insitu.testing.origin_of", ValueError, lambda: insitu.testing.origin_of(0.5)),
    ("insitu.testing.oracle_values", ValueError, lambda: insitu.testing.oracle_values("mlp_out", 99, 0, 1, 1)),
    ("insitu.testing.oracle_model", ValueError, lambda: insitu.testing.oracle_model()(torch.ones(1, 9))),
    ("insitu.testing.expect", AssertionError, lambda: insitu.testing.expect([], step_id=1)),
    ("insitu.testing.Sentences", AssertionError, lambda: insitu.testing.expect(Recording()).steps(1)),
    ("insitu.testing.FakeClock", ValueError, lambda: insitu.testing.FakeClock().advance(-1)),
)


def source() -> Any:
    from insitu.identity import Source

    return Source(run="0" * 16)


@pytest.mark.parametrize(("name", "error", "act"), BAD, ids=[f"{name}-{error.__name__}" for name, error, _ in BAD])
def test_it_fails_as_it_says_in_one_line(name: str, error: type[BaseException], act: Callable[[], Any]) -> None:
    said = words_of(PUBLIC[name])
    assert any(re.search(rf"\b{kind.__name__}\b", said) for kind in error.__mro__)
    with pytest.raises(error) as raised:
        act()
    told = str(raised.value)
    assert told
    assert "\n" not in told or error is AssertionError, "to these pytest adds what was compared"


def test_a_name_that_is_none_is_told_those_there_are() -> None:
    with pytest.raises(KeyError, match=r"'lunch' is no class of intervals; it may be idle, schedule, recv_wait, "):
        closing(session, lambda s: s.interval("lunch"))()
    with pytest.raises(KeyError, match=r"'lost' is no event of a request; it may be arrived, queued, "):
        closing(session, lambda s: s.request("lost", "one"))()
    with pytest.raises(KeyError, match=r"'lunch' is no phase; it may be prefill, decode, mixed"):
        closing(session, lambda s: s.step(phase="lunch"))()


ELSEWHERE: Final = {
    ("insitu.Session.collect", "TimeoutError"): "test_collecting.py",
    ("insitu.Session.requests", "ValueError"): "test_transformers_generate.py",
    ("insitu.testing.check_exporter", "Broken"): "test_check_exporter.py",
    ("insitu.testing.check_exporter", "NotChecked"): "test_check_exporter.py",
    ("insitu.testing.check_architecture", "Broken"): "test_check_sites.py",
    ("insitu.testing.check_architecture", "NotChecked"): "test_check_sites.py",
    ("insitu.testing.check_statistic", "Broken"): "test_check_statistic.py",
}
"""Errors that another file of these tests shows."""


def named_errors() -> Iterator[tuple[str, str]]:
    for name, thing in PUBLIC.items():
        for sentence in re.findall(r"[Rr]aises[^.;]*", words_of(thing)):
            yield from ((name, error) for error in re.findall(r"\b(?:[A-Z]\w*Error|Broken|NotChecked)\b", sentence))


def test_every_error_that_a_docstring_names_is_shown_here() -> None:
    shown = {(name, kind.__name__) for name, error, _ in BAD for kind in error.__mro__}
    missing = {each for each in named_errors() if each not in shown and each not in ELSEWHERE}
    # `Session` and what decorates are made by attach and start, whose errors are theirs.
    assert missing <= {("insitu.Session", "OSError"), ("insitu.observe", "OSError")}
    for (_, error), file in ELSEWHERE.items():
        assert f"pytest.raises({error}" in (Path(__file__).parent / file).read_text()


def test_what_exporters_raise_carries_what_it_was_given() -> None:
    assert Retry(1.5).after_s == 1.5
    assert Refused(DropReason.REFUSED_INVALID, "why").args == ("refused_invalid: why",)


# -- and the docs tell of it -----------------------------------------------------------------------------------------


def told() -> set[str]:
    """Return the words that stand in code on the pages about the probe."""
    text = "\n".join((DOCS / page).read_text() for page in TOLD_IN)
    code = re.findall(r"^```.*?^```|`[^`\n]+`", text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"\w+", "\n".join(code)))


def test_the_docs_tell_of_each_name() -> None:
    words = told()
    untold = [name for name in (*PUBLIC, *FIXTURES) if name.rpartition(".")[2] not in words]
    assert untold == []
    assert "no_such_name" not in words


@pytest.mark.parametrize(
    "cls", [insitu.Rule, insitu.Flight, insitu.Rows, insitu.RequestContext], ids=lambda c: c.__name__
)
def test_the_docs_tell_of_each_field(cls: type) -> None:
    words = told() | set(re.findall(r"\w+", (DOCS / "otel.md").read_text()))
    assert [name for name in cls.__dataclass_fields__ if name not in words] == []  # type: ignore[attr-defined]


def test_the_table_of_settings_is_the_settings() -> None:
    page = (DOCS / "probe.md").read_text()
    section = page.partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in section.splitlines() if row.startswith("| `")]
    found = {name.strip("`"): (variable.strip("`"), key.strip("`")) for name, variable, key, *_ in rows}
    assert found == {setting.name: (setting.variable or "", setting.key or "") for setting in SETTINGS}
