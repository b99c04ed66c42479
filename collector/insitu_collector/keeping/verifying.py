"""Is a store whole: every checksum, footer and schema, the catalog, the twins, and what was left unfinished."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pyarrow as pa

from insitu.records import TABLES
from insitu.segments.erased_file import ErasedFile
from insitu.segments.layout import (
    OPEN,
    QUARANTINE,
    REPLACING,
    SEALED,
    SegmentName,
    files_in,
    is_in_use,
    list_segments,
    odd_segments,
)
from insitu.segments.reader import TailReader
from insitu.segments.stored import is_known, newer_text
from insitu.segments.whole import NewerFormat, NotWhole, WholeSegment
from insitu_collector.keeping.catalog import CatalogBusy, anchors_of, catalog_path, load_catalog
from insitu_collector.keeping.facts import Anchors, SegmentFacts, facts_of
from insitu_collector.keeping.held import rows_held
from insitu_collector.keeping.letters import letters_with
from insitu_collector.keeping.orders import still_there
from insitu_collector.keeping.shards import shards_of
from insitu_collector.keeping.twins import list_twins, twin_path, twin_problem

MOVE: Final = "move"
"""The remedy for what is no file: nobody but people can tell what it is."""
REMEDIES: Final = {
    "damaged": "repair",
    "catalog": "repair",
    "twin": "repair",
    "unfinished": "repair",
    "not_erased": "compact",
}
"""Which command of `insitu store` sees to what kind of problem. `newer` and `quarantined` leave a store whole."""
_OF_WRITERS: Final = ("damaged", "not_erased")
"""Kinds that no command sees to in a shard that is being written."""
_NO_FILE: Final = "it is no file; move it out of the store"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    kind: str
    file: str
    text: str
    remedy: str | None
    """`repair`, `compact`, `move`; None: it leaves the store whole."""
    waits_for: str = ""
    """The shard whose writer has to end before that."""

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "file": self.file, "text": self.text}


@dataclass
class Verified:
    """What was looked at, and what was found."""

    num_segments: int = 0
    num_rows: int = 0
    """That can be read."""
    num_unreadable: int = 0
    """Rows that cannot be, as far as heads, catalog and twins tell of them."""
    num_bytes: int = 0
    num_twins: int = 0
    has_catalog: bool = False
    problems: list[Problem] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    """Shards that are being written: their open files are looked at as far as they go."""

    @property
    def is_whole(self) -> bool:
        return not any(problem.remedy for problem in self.problems)

    def add(self, kind: str, file: SegmentName | Path | str, text: str, remedy: str | None = None) -> None:
        """remedy: another one than that of its kind."""
        shard = file.shard if isinstance(file, SegmentName) else ""
        waits_for = shard if shard in self.in_use and kind in _OF_WRITERS and remedy is None else ""
        self.problems.append(Problem(kind, str(file), text, remedy or REMEDIES.get(kind), waits_for))


def verify(store: Path) -> Verified:
    """Read everything in a store and compare it with what it says of itself. Changes nothing. Raises OSError."""
    result = Verified()
    dead = _sort_shards(store, result)
    anchors = anchors_of(store)
    facts = {name: _look(store, name, anchors, result) for name in list_segments(store, SEALED)}
    _look_at_catalog(store, facts, result)
    _look_at_open(store, dead, result)
    for name in list_twins(store):
        result.num_twins += 1
        _look_at_twin(store, name, facts.get(name), result)
    for state in (SEALED, OPEN):
        for name in odd_segments(store, state):
            result.add("damaged", name, _NO_FILE, MOVE)
    for name in files_in(store, QUARANTINE, ".arrow"):
        result.add("quarantined", name, "damaged; what was whole of it is in a sealed segment")
    _look_at_erasures(store, result)
    return result


def _sort_shards(store: Path, result: Verified) -> set[str]:
    """Note which shards are in use; return the others."""
    dead = set()
    for shard in shards_of(store):
        if is_in_use(store, shard):
            result.in_use.append(shard)
        else:
            dead.add(shard)
    return dead


def _look(store: Path, name: SegmentName, anchors: Anchors, result: Verified) -> SegmentFacts | None:
    try:
        facts = facts_of(store, name, anchors)
    except FileNotFoundError:  # expired since
        return None
    result.num_segments += 1
    result.num_bytes += facts.num_bytes
    if facts.state == "damaged":
        _count(store, name, SEALED, result, num_held=sum(rows_held(store, name).values()))
    else:
        result.num_rows += facts.num_rows
    if facts.state != "sealed":
        result.add(facts.state, name, _why(store, name))
        return facts
    text = _footer_problem(name.path(store, SEALED), name.table, facts.num_batches)
    if text:
        result.add("damaged", name, text)
    return facts


def _count(store: Path, name: SegmentName, state: str, result: Verified, num_held: int = 0) -> str:
    """Count the rows of a segment that may not be whole: those that can be read, and those that cannot.

    Return why it cannot be read here, if it is of a newer format.
    """
    try:
        reader = TailReader(store, name, state)
    except FileNotFoundError:  # sealed or expired since
        return ""
    with closing(reader):
        num_readable = sum(placed.batch.num_rows for placed in reader.read_pieces())
    num_lost = sum(damage.num_rows or 0 for damage in reader.damage if state == SEALED or not damage.torn)
    result.num_rows += num_readable
    result.num_unreadable += max(num_lost, num_held - num_readable)
    return newer_text(reader.newer) if reader.newer else ""


def _why(store: Path, name: SegmentName) -> str:
    if name.table not in TABLES:
        return _no_table(name)
    try:
        for _ in WholeSegment(name.path(store, SEALED), name.table).batches():
            pass
    except (NewerFormat, NotWhole) as error:
        return str(error)
    return "it was damaged a moment ago"


def _no_table(name: SegmentName) -> str:
    return f"there is no table {name.table!r} here: update insitu to read it"


def _footer_problem(path: Path, table: str, num_batches: int) -> str:
    """Compare the footer, by which other programs read a file, with the batches in it."""
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as found:
            if found.num_record_batches != num_batches:
                return f"its footer names {found.num_record_batches} batches, of {num_batches}"
            if not is_known(found.schema, table):
                return "its columns are not those of its table"
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"its footer cannot be read: {str(error).splitlines()[0]}"
    return ""


def _look_at_catalog(store: Path, facts: dict[SegmentName, SegmentFacts | None], result: Verified) -> None:
    """Compare the catalog with the segments. It is read after them: a running collector changes both meanwhile."""
    path = catalog_path(store)
    try:
        known = load_catalog(path)
    except CatalogBusy:
        result.has_catalog = True
        return
    result.has_catalog = known is not None
    if known is None and path.is_dir():
        result.add("catalog", path.name, _NO_FILE, MOVE)
    elif known is None and path.exists():
        result.add("catalog", path.name, "it cannot be read")
    for name, entry in (known or {}).items():
        found = facts.get(name)
        if found is None:
            if not name.path(store, SEALED).exists():
                result.add("catalog", name, "the catalog has it, and it has gone")
        elif (entry.crc32, entry.num_bytes, entry.num_rows) != (found.crc32, found.num_bytes, found.num_rows):
            result.add("catalog", name, "the catalog tells otherwise of it")


def _look_at_twin(store: Path, name: SegmentName, of: SegmentFacts | None, result: Verified) -> None:
    """Compare a twin with its segment. of: None of one that has gone, or was made since."""
    path, file = twin_path(store, name), f"twins/{name.file}"
    if path.is_dir():
        result.add("twin", file, _NO_FILE, MOVE)
        return
    if of is None and not name.path(store, SEALED).exists():
        text = "its segment has gone"
    else:
        text = twin_problem(store, name, of.num_rows if of is not None and of.state == "sealed" else None)
    if text and path.exists():  # else removed since
        result.add("twin", file, text)


def _look_at_open(store: Path, dead: set[str], result: Verified) -> None:
    for name in list_segments(store, OPEN):
        if name.shard in dead:
            newer = _count(store, name, OPEN, result) if name.table in TABLES else _no_table(name)
            if newer:
                result.add("newer", name, newer)
            else:
                result.add("unfinished", name, "its writer has gone and left it open")
        elif name.table in TABLES:
            try:
                reader = TailReader(store, name, OPEN)
            except FileNotFoundError:  # sealed since
                continue
            result.num_rows += sum(batch.num_rows for batch in reader.read())
            reader.close()
            for damage in reader.damage:
                result.num_unreadable += damage.num_rows or 0
                result.add("damaged", name, f"{damage.num_bytes} bytes at {damage.offset} cannot be read")
    for name in files_in(store, REPLACING, ".json"):
        if name.shard in dead:
            result.add("unfinished", name, "it was taking the place of others when its writer went")


def _look_at_erasures(store: Path, result: Verified) -> None:
    erased = ErasedFile(store).read()
    now = time.time_ns()
    overdue = [order for order in erased.erasures if order.due_unix_ns < now]
    if overdue:
        for name in still_there(store, erased, shards_of(store)):
            result.add("not_erased", name, "it still holds what was to be erased by now")
        for path in letters_with(store, erased):
            result.add("not_erased", path.relative_to(store), "it still holds what was to be erased by now")
