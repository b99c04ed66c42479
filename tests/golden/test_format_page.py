"""docs/format.md says of every table, column, name and number what the code has, and since which version."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cache
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from insitu import vocabulary
from insitu.exporters.base import Batch
from insitu.records import IDENTITY, TABLES, VERSION, schema_of, table_spec
from insitu.segments.file import batch_metadata, file_schema
from insitu.segments.layout import STATES, SegmentName

PAGE: Final = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
STORES: Final = Path(__file__).parent / "stores"
UNITS: Final = {"", "ns", "ns, Unix", "ns, monotonic", "bytes", "rows", "steps", "tokens", "values", "frames", "nats"}
UNITS_OF_COUNTS: Final = {"requests", "triggers"}


@dataclass(frozen=True, slots=True)
class Told:
    """One line of a table of the page: a column."""

    name: str
    type: str
    since: str
    unit: str
    meaning: str


def columns_in(text: str) -> list[Told]:
    """Return what a part of the page says of columns."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| `\w+` \|", line)]
    return [Told(name.strip(" `"), *(cell.strip() for cell in cells)) for name, *cells in lines]


def part(heading: str) -> str:
    """Return what stands under a heading, to the next one of its level or above."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, f"docs/format.md has no {heading!r}"
    return found[1]


@cache
def first_version(table: str, column: str = "epoch") -> str:
    """Return the first version whose golden store has a column: what is in none came with this one."""
    for folder in sorted(STORES.iterdir(), key=lambda each: [int(number) for number in each.name.split(".")]):
        rows = folder / "rows" / f"{table}.parquet"
        if rows.exists() and column in pq.read_schema(rows).names:
            return folder.name
    return VERSION


@pytest.mark.parametrize("table", TABLES)
def test_every_column_of_a_table_is_described(table: str) -> None:
    told = columns_in(part(f"### `{table}`"))
    fields = list(schema_of(table))[len(IDENTITY) :]
    assert [(each.name, each.type, each.since) for each in told] == [
        (field.name, str(field.type), first_version(table, field.name)) for field in fields
    ]
    units = {*UNITS, *UNITS_OF_COUNTS, *(f"`{name}`" for name in vars(vocabulary))}
    for each in told:
        assert len(each.meaning) > 2, f"{table}.{each.name} has no meaning"
        assert each.unit in units, f"{table}.{each.name}: {each.unit!r} is no unit"
        assert each.name.endswith("_ns") == each.unit.startswith("ns"), f"{table}.{each.name}: {each.unit!r}"


@pytest.mark.parametrize("table", TABLES)
def test_a_table_says_its_stream_its_version_and_its_writers(table: str) -> None:
    found = re.match(r"\nStream (\d+), since ([\d.]+), written by: [^.]{4,}\. ", part(f"### `{table}`"))
    assert found is not None
    assert (int(found[1]), found[2]) == (table_spec(table).stream, first_version(table))


def test_tables_stand_in_order_and_none_is_made_up() -> None:
    assert re.findall(r"^### `(\w+)`$", part("## Tables"), re.MULTILINE) == list(TABLES)
    told = columns_in(part("## Types, units, time"))
    assert [(each.name, each.type) for each in told] == [(name, str(kind)) for name, kind in IDENTITY]


def test_the_current_version_and_what_came_with_each_are_told() -> None:
    assert f"The current version is **{VERSION}**" in PAGE
    told = re.findall(r"^\| (\d+\.\d+) \| (.+) \|$", part("## What is promised"), re.MULTILINE)
    major, minor = map(int, VERSION.split("."))
    assert [version for version, _ in told] == [f"{major}.{each}" for each in range(minor + 1)]
    for version, what in told[1:]:
        gained = {table for table in TABLES for name in schema_of(table).names if first_version(table, name) == version}
        assert gained <= set(re.findall(r"`(\w+)`", what)), f"{version} has more than that"


@pytest.mark.parametrize("enum", ["IntervalClass", "Phase", "Variant", "RequestEvent"])
def test_stored_numbers_are_told(enum: str) -> None:
    kind: type[IntEnum] = getattr(vocabulary, enum)
    assert f"| `{enum}` | {', '.join(f'{int(each)} {each.name.lower()}' for each in kind)} |" in PAGE


@pytest.mark.parametrize("enum", ["Role", "DropReason", "Reason", "IncidentState", "VerdictKind"])
def test_stored_names_are_told(enum: str) -> None:
    kind: type[StrEnum] = getattr(vocabulary, enum)
    assert f"| `{enum}` | {', '.join(f'`{each}`' for each in kind)} |" in PAGE


def test_files_and_their_metadata_are_as_told() -> None:
    files = part("## Files")
    name = SegmentName("events", "collector", 3)
    for state in STATES:
        assert f"STORE/v1/{state}/<table>/<shard>-<n>.arrow" in files
        assert str(name.path(Path("STORE"), state)) == f"STORE/v1/{state}/events/collector-0000000003.arrow"
    schema = file_schema(name, table_spec("events"))
    batch = Batch(7, 0, pa.RecordBatch.from_pylist([], schema=schema_of("events")), "events")
    keys = [*(key.decode() for key in schema.metadata), *batch_metadata(batch)]
    assert re.findall(r"^\| `([\w.]+)` \|", files, re.MULTILINE) == keys
