"""What is asked, as a message, and back. Pure."""

from __future__ import annotations

from typing import Any

from insitu.wire.insitu_pb2 import RowsQuery
from insitu_collector.query.asked import Asked

_NUMBERS = ("replica", "rank", "stage", "layer", "site", "request", "epoch")


def to_message(table: str, asked: Asked) -> RowsQuery:
    """Return a question as a message. Raises BadQuestion for times and steps that are none."""
    begin, end = asked.window
    steps = asked.step_range
    said: dict[str, Any] = {name: getattr(asked, name) for name in _NUMBERS}
    said |= {"begin_unix_ns": begin, "end_unix_ns": end}
    if steps is not None:
        said |= {"begin_step": steps.start, "end_step": steps.stop}
    return RowsQuery(
        table=table,
        run=asked.run,
        columns=asked.columns or (),
        row_seqs=asked.row_seqs or (),
        **{name: value for name, value in said.items() if value is not None},
    )


def from_message(message: RowsQuery) -> Asked:
    """Return the question that a message asks."""
    said = {name: getattr(message, name) for name in _NUMBERS if message.HasField(name)}
    steps = None
    if message.HasField("begin_step") or message.HasField("end_step"):
        end = message.end_step if message.HasField("end_step") else 2**63 - 1
        steps = range(message.begin_step, end)
    return Asked(
        t0=message.begin_unix_ns if message.HasField("begin_unix_ns") else None,
        t1=message.end_unix_ns if message.HasField("end_unix_ns") else None,
        run=message.run,
        steps=steps,
        row_seqs=tuple(message.row_seqs) or None,
        columns=tuple(message.columns) or None,
        **said,
    )
