"""Sentences to expect of what a probe recorded. Each says what there was instead when it does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from insitu.testing.recording import Recording

if TYPE_CHECKING:
    from insitu.session.accounts import Stats

NUM_SHOWN: Final = 8
"""Rows that a message lists."""


class Sentences:
    """What is expected of a recording (records). Those that only assert return it again, so that the next can follow.

    Each raises AssertionError that says what there was instead.
    """

    def __init__(self, records: Recording) -> None:
        self._records = records

    def row(self, table: str, **columns: Any) -> dict[str, Any]:
        """Exactly one row of a table has these columns; return it."""
        return expect(self._records.rows(table), **columns)

    def no_row(self, table: str, **columns: Any) -> Sentences:
        """No row of a table has these columns."""
        found = self._records.rows(table, **columns)
        assert not found, f"expected no row of {table} with {columns}, found {found[:NUM_SHOWN]}"
        return self

    def steps(self, num_steps: int) -> Sentences:
        """So many steps were recorded, each under a number of its own."""
        found = [row["step_id"] for row in self._records.rows("steps")]
        assert len(found) == len(set(found)) == num_steps, f"expected {num_steps} steps, found {found[:NUM_SHOWN]}"
        return self

    def every_row_once(self) -> Sentences:
        """Each table has the rows 0, 1, 2, ... of each process, none twice and none missing."""
        for table in {batch.table for batch in self._records.batches}:
            rows = self._records.table(table).select(["epoch", "row_seq"]).to_pylist()
            for epoch in {row["epoch"] for row in rows}:
                found = sorted(row["row_seq"] for row in rows if row["epoch"] == epoch)
                odd = sorted(set(range(len(found))).symmetric_difference(found))
                assert not odd, f"expected each row of {table} once, missing, twice or too high: {odd[:NUM_SHOWN]}"
        return self

    def account_of(self, stats: Stats) -> Sentences:
        """After `close`: of each table the session produced what is recorded here and what it says it dropped."""
        for table, produced in stats.produced.items():
            kept, dropped = self._records.table(table).num_rows, stats.dropped.get(table, {})
            assert produced == kept + sum(dropped.values()), f"{table}: {produced} made, {kept} kept, {dropped} dropped"
        return self

    def captured(self, site: str, **columns: Any) -> NDArray[Any]:
        """Rows of a site were captured, of the steps or requests that `columns` name; return them, [rows, width].

        bfloat16, which numpy has not, as its bits.
        """
        number = self.row("sites", name=site)["site"]
        found = self._records.rows("captures", site=number, **columns)
        assert found, (
            f"expected rows of {site} with {columns}, found none of {self._records.table('captures').num_rows}"
        )
        kinds = {"bfloat16": "uint16", "bool": "bool"}
        return np.stack([np.frombuffer(row["data"], kinds.get(row["dtype"], row["dtype"])) for row in found])

    def the_oracle_is_right(self) -> Sentences:
        """Each row that was captured of an oracle model is of the site, step and row that it is stored under."""
        from insitu.testing.oracle import Origin, origin_of

        names = {row["site"]: row["name"] for row in self._records.rows("sites")}
        found = self._records.rows("captures")
        assert found, "expected captured rows of an oracle model, found none"
        for row in found:
            values = {origin_of(value) for value in np.frombuffer(row["data"], np.float32).tolist()}
            layer, _, site = names[row["site"]].removeprefix("L").partition(".")
            stored = Origin(site, int(layer), row["step_id"], row["row"])
            assert values == {stored}, f"expected a row of {stored}, found one of {sorted(values)}"
        return self


@overload
def expect(what: Recording) -> Sentences: ...
@overload
def expect(what: list[dict[str, Any]], **columns: Any) -> dict[str, Any]: ...
def expect(what: Any, **columns: Any) -> Any:
    """Begin a sentence about a recording; or assert that exactly one row of a list has these columns, and return it.

    what: a `Recording`, or rows as dictionaries. Raises AssertionError that says what there was instead.
    """
    if isinstance(what, Recording):
        return Sentences(what)
    found = [row for row in what if all(row[column] == value for column, value in columns.items())]
    assert len(found) == 1, f"expected one row with {columns}, found {len(found)} among {what[:NUM_SHOWN]}"
    return found[0]
