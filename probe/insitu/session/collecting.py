"""Offline: a model run over inputs, waiting for room, and all that its rules took of it as Arrow tables.

For notebooks and datasets. A server never waits; here nothing is dropped for want of room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from insitu.records import schema_of
from insitu.session.collected_rows import side_by_side

if TYPE_CHECKING:
    from insitu.session.live import Session

WAIT_S: Final = 60.0
"""How long a destination may take nothing before that is an error."""
SLICE_S: Final = 0.2
"""How long to wait for acknowledgements before looking for room again."""

Call = Callable[[Any], Any]


@dataclass(frozen=True)
class Collected:
    """What became of the inputs: rows of every table, as they are stored too, and which step belongs to which input."""

    tables: Mapping[str, pa.Table]
    sites: Mapping[int, str]
    """Names by number."""
    inputs: pa.Table
    """`input` (its place, from 0), `first_step`, `num_steps`: an input that generates takes many steps."""
    dropped: Mapping[str, Mapping[str, int]]
    """Rows by table and reason; empty unless the destination refused them."""

    def table(self, name: str) -> pa.Table:
        """Return the rows of a table (`captures`, `statistics`, `steps`, ...) with the `input` they are of."""
        found = self.tables.get(name, schema_of(name).empty_table())
        return self._with_input(found) if "step_id" in found.column_names else found

    def rows(self) -> pa.Table:
        """Return captured rows joined: `input`, `step_id`, `request`, `row`, `position`, and a column a site."""
        captures = self.tables.get("captures")
        if captures is None or not len(captures):
            return self._with_input(
                schema_of("captures").empty_table().select(["step_id", "request", "row", "position"])
            )
        return self._with_input(side_by_side(captures, self.sites))

    def _with_input(self, table: pa.Table) -> pa.Table:
        first = self.inputs["first_step"].to_numpy()
        of = np.searchsorted(first, table["step_id"].to_numpy(), side="right") - 1
        return table.add_column(0, "input", pa.array(of, pa.int64()))


class _Room:
    """Waits until a step finds a place for all that it leaves."""

    def __init__(self, session: Session, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s

    def wait(self) -> None:
        """Return once there is room. Raises TimeoutError when the destination makes none."""
        since = time.monotonic()
        while not self._session.has_room:
            if time.monotonic() - since > self._timeout_s:
                raise TimeoutError(f"{self._session.to} has taken nothing for {self._timeout_s:g} s")
            self._session.flush(SLICE_S)


def collect(session: Session, inputs: Iterable[Any], call: Call, timeout_s: float) -> Collected:
    """Run `call` for each input, and return what the session's rules took; it goes to the destination as well.

    What is returned lies in memory, as much as it is. Raises TimeoutError, and whatever `call` raises.
    """
    import torch

    items = iter(inputs)
    first_one = list(islice(items, 1))
    with torch.no_grad():
        for each in first_one if session.is_learning else ():
            call(each)  # a first step tells how wide rows are, and none are taken of it
    session.flush(timeout_s)  # what came before is no part of it
    before = session.stats().dropped
    kept: dict[str, list[pa.RecordBatch]] = {}
    steps: list[tuple[int, int, int]] = []
    with session.waiting(_Room(session, timeout_s).wait, lambda table, rows: kept.setdefault(table, []).append(rows)):
        with torch.no_grad():
            for number, each in enumerate(chain(first_one, items)):
                first = session.next_step
                call(each)
                steps.append((number, first, session.next_step - first))
        session.flush(timeout_s)
    return Collected(
        {name: pa.Table.from_batches(batches) for name, batches in kept.items()},
        {site.number: site.name for site in session.sites()},
        pa.table(
            [pa.array(column, pa.int64()) for column in (zip(*steps, strict=True) if steps else ((), (), ()))],
            names=["input", "first_step", "num_steps"],
        ),
        _more(session.stats().dropped, before),
    )


def nothing() -> Collected:
    """Return what is collected where nothing is observed."""
    names = ["input", "first_step", "num_steps"]
    return Collected({}, {}, pa.table([pa.array([], pa.int64())] * 3, names=names), {})


def caller(model: Any) -> Call:
    """Return how a model is called with an input: a dictionary by name, a tuple in order, else as one argument."""

    def call(each: Any) -> Any:
        if isinstance(each, Mapping):
            return model(**each)
        return model(*each) if isinstance(each, tuple) else model(each)

    return call


def _more(after: Mapping[str, Mapping[str, int]], before: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Return by how much counts grew."""
    grown = {
        table: {
            reason: num_rows - before.get(table, {}).get(reason, 0)
            for reason, num_rows in reasons.items()
            if num_rows > before.get(table, {}).get(reason, 0)
        }
        for table, reasons in after.items()
    }
    return {table: reasons for table, reasons in grown.items() if reasons}
