"""SQL over a store, run by DuckDB: it reads only the columns and batches that a query needs.

Each table stands under its name as it is stored, and in schema `named` as `rows()` gives it: with runs, places, names
of sites and Unix times beside the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import LocalFileSystem

from insitu.records import TABLES, schema_of
from insitu.segments.erased_file import ErasedUnreadable
from insitu_collector.query.asked import EVERY_RUN, Asked, BadQuestion
from insitu_collector.query.extents import Bools, Extents
from insitu_collector.query.pruning import MayHaveSteps, Wanted
from insitu_collector.query.rows import Question, Rows, named_schema
from insitu_collector.query.segment import PAYLOAD

if TYPE_CHECKING:
    import duckdb

STRANGERS_BATCH_ROWS: Final = 2048
"""Of an answer: a row may be large, and as many are made at a time. DuckDB makes no fewer."""
MOST_SAID: Final = 500
"""Characters of what DuckDB says, names too: a reader's gRPC takes 8 KiB, and a character may be twelve bytes there."""
STORE_AWAY: Final = "the store of this collector has gone; ask again when it is back"
TOO_MUCH_MEMORY: Final = "the query needs more memory than one may have here; ask for less at a time"
_FORMAT: Final = ds.IpcFileFormat()
_FILES: Final = LocalFileSystem()
_WORD: Final = re.compile(r"\w+")
_UNSAFE: Final = {"python_enable_replacements": "false", "autoinstall_known_extensions": "false"}
"""Without these a name of a table may mean a variable of this program, and a function a package to be fetched."""


class QueryTooLarge(BadQuestion):
    """A query took more than it may: rows, memory or time."""


class QueryFailed(Exception):
    """A query was not answered, and not by what it asks for: its process ended, or there is no store. One line."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query of a stranger may take; `memory_bytes`: as DuckDB counts, its process has a fixed part more."""

    max_rows: int = 1_000_000
    memory_bytes: int = 256 << 20
    seconds: float = 30.0
    threads: int = 1


class StoreTable(ds.Dataset):  # type: ignore[misc]  # pyarrow has no types
    """One table as DuckDB reads it: it says which columns and which rows, as a filter, and gets batches."""

    def __init__(self, schema: pa.Schema, batches: Callable[[Sequence[str], Any], Iterator[pa.RecordBatch]]) -> None:
        self._schema = schema
        self._batches = batches

    @property
    def schema(self) -> pa.Schema:
        """Every column there is."""
        return self._schema

    def scanner(self, columns: Sequence[str] | None = None, filter: Any = None, **_: Any) -> ds.Scanner:
        """Return a reader of some columns of the rows that pass a filter; only columns either names are read."""
        wanted = list(self._schema.names if columns is None else columns)
        named = set(_WORD.findall(str(filter))) if filter is not None else set()
        needed = [name for name in self._schema.names if name in wanted or name in named] or self._schema.names[:1]
        schema = pa.schema([self._schema.field(name) for name in needed])
        reader = pa.RecordBatchReader.from_batches(schema, self._batches(needed, filter))
        return ds.Scanner.from_batches(reader, columns=wanted, filter=filter, use_threads=False)


def stored_table(rows: Rows, table: str) -> StoreTable:
    """Return a table as it is stored, each row once."""
    schema, every = schema_of(table), Question(rows, table, Asked(run=EVERY_RUN))

    def batches(columns: Sequence[str], filter: Any) -> Iterator[pa.RecordBatch]:
        payload = PAYLOAD.get(table) in columns
        keep = _passing(schema, filter)
        wanted = Wanted(may_have_steps=_passing_steps(schema, filter))
        for batch in rows.scan(table, lambda extents: every.keep(extents) & keep(extents), wanted, payload=payload):
            yield every.meant(batch).select(columns)

    return StoreTable(schema, batches)


def named_table(rows: Rows, table: str) -> StoreTable:
    """Return a table with what its numbers mean."""
    schema = named_schema(table)

    def batches(columns: Sequence[str], filter: Any) -> Iterator[pa.RecordBatch]:
        question = Question(rows, table, Asked(run=EVERY_RUN, columns=columns))
        keep = _passing(schema, filter)
        for batch in question.batches(keep, _passing_steps(schema, filter)):
            meant = question.meant(batch)
            if meant.num_rows:
                yield question.shaped(batch, meant)

    return StoreTable(schema, batches)


def _passing(schema: pa.Schema, filter: Any) -> Callable[[Extents], Bools]:
    """Return what says of each batch whether any row may pass a filter: by Arrow's own simplification of it."""

    def keep(extents: Extents) -> Bools:
        found = extents.all()
        if filter is None or not len(found):
            return found
        columns = [name for name in extents.columns if _is_as_stored(schema, name)]
        found[:] = False
        found[_may_pass(schema, filter, _guarantees(schema, extents, columns))] = True
        return found

    return keep


def _passing_steps(schema: pa.Schema, filter: Any) -> MayHaveSteps | None:
    """Return what says whether any row with one of some steps, or of no step, may pass a filter."""
    if filter is None or "step_id" not in schema.names:
        return None
    step, zero = pc.field("step_id"), pa.scalar(0, schema.field("step_id").type)

    def may_have(first: int, last: int) -> bool:
        inside = (step >= pa.scalar(first, zero.type)) & (step <= pa.scalar(last, zero.type))
        return bool(_may_pass(schema, filter, (inside, step < zero, step.is_null())))

    return may_have


def _may_pass(schema: pa.Schema, filter: Any, guarantees: Iterable[Any]) -> list[int]:
    """Return the places of those guarantees under which rows may pass a filter."""
    fragments = [_FORMAT.make_fragment(str(place), _FILES, each) for place, each in enumerate(guarantees)]
    dataset = ds.FileSystemDataset(fragments, schema, _FORMAT, _FILES)
    return [int(fragment.path) for fragment in dataset.get_fragments(filter=filter)]


def _is_as_stored(schema: pa.Schema, name: str) -> bool:
    """Return whether a column says the number it is stored as: a site's name, and Unix times made of others, do not."""
    return name in schema.names and pa.types.is_integer(schema.field(name).type)


def _guarantees(schema: pa.Schema, extents: Extents, columns: Sequence[str]) -> Iterator[Any]:
    """Yield, for each batch, an expression that holds for every row of it."""
    bounds = {name: (extents.low(name), extents.high(name), extents.has_null(name)) for name in columns}
    epochs = extents.epoch
    for place in range(len(extents)):
        said = pc.field("epoch") == pa.scalar(epochs[place].item(), pa.uint64())
        for name, (low, high, has_null) in bounds.items():
            if not has_null[place] and low[place] <= high[place]:
                kind = schema.field(name).type
                said &= pc.field(name) >= pa.scalar(int(low[place]), kind)
                said &= pc.field(name) <= pa.scalar(int(high[place]), kind)
        yield said


@contextmanager
def connection(rows: Rows, query: str, limits: Limits | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open DuckDB over the tables of a store that a query names, all of them where it names none.

    limits: of strangers, who get no files, no settings and no more than these.
    """
    import duckdb

    config: dict[str, Any] = dict(_UNSAFE)
    if limits is not None:
        config |= {"memory_limit": f"{limits.memory_bytes}B", "threads": limits.threads, "temp_directory": ""}
    with duckdb.connect(config=config) as opened:
        opened.execute("create schema named")
        for table in [table for table in TABLES if table in query.lower()] or TABLES:  # each takes a few milliseconds
            opened.register(table, stored_table(rows, table))
            opened.register(f"named_{table}", named_table(rows, table))
            opened.execute(f'create view named."{table}" as select * from "named_{table}"')
        if limits is not None:
            opened.execute("set enable_external_access = false")
            opened.execute("set lock_configuration = true")
        yield opened


def run(rows: Rows, query: str) -> pa.Table:
    """Return the rows of a query. Raises BadQuestion, one line that says what is wrong with it."""
    with connection(rows, query) as opened, _one_line():
        return opened.sql(query).to_arrow_table()


def stream(
    rows: Rows, query: str, limits: Limits, begins: Callable[[], None] = lambda: None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a stranger's query: one statement that reads. First comes a batch without rows, of its schema.

    Not for a process that has anything to lose: what functions make by themselves DuckDB does not account for, and
    nothing here ends a query that takes long. begins: called before anything looks into the query. Raises BadQuestion,
    and QueryTooLarge where it takes more rows or memory than `limits`.
    """
    with connection(rows, query, limits) as opened, _one_line():
        begins()
        _check_reads_only(opened, query)
        with opened.sql(query).to_arrow_reader(STRANGERS_BATCH_ROWS) as reader:
            yield pa.RecordBatch.from_pylist([], schema=reader.schema)
            yield from _at_most(limits.max_rows, reader)


def _at_most(max_rows: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    num_rows = 0
    for batch in batches:
        num_rows += batch.num_rows
        if num_rows > max_rows:
            raise QueryTooLarge(f"the answer has more than {max_rows:,} rows; ask for fewer, or with a `limit`")
        yield batch


def _check_reads_only(opened: duckdb.DuckDBPyConnection, query: str) -> None:
    import duckdb

    statements = opened.extract_statements(query)
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise BadQuestion("one SELECT at a time: a store is only read")


@contextmanager
def _one_line() -> Iterator[None]:
    import duckdb

    try:
        yield
    except (duckdb.OutOfMemoryException, MemoryError):
        raise QueryTooLarge(TOO_MUCH_MEMORY) from None
    except (duckdb.Error, pa.ArrowException) as error:
        raise BadQuestion(_first_line(error)) from None
    except ErasedUnreadable:
        raise
    except OSError as error:  # what DuckDB says after the first row comes as one of Arrow's
        if error.errno is not None:
            raise
        said = _first_line(error)
        raise (QueryTooLarge(TOO_MUCH_MEMORY) if "Out of Memory Error" in said else BadQuestion(said)) from None


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= MOST_SAID else f"{line[:MOST_SAID]}..."
