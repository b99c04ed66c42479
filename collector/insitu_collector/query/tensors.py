"""Captured rows as tensors: one row, or all of a request at each site, in the order of their positions.

Rows of tensor-parallel ranks are put together; a position that is not there is said to be missing, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu_collector.clocks.timeline import Int64
from insitu_collector.query.asked import Asked, BadQuestion
from insitu_collector.query.directory import Directory
from insitu_collector.query.forms import array_of, item_bytes, split
from insitu_collector.query.payloads import Bytes, Piece, joined
from insitu_collector.query.tensor_parallel import Shard, merged
from insitu_collector.rows.selection import NothingFound

COLUMNS: Final = (
    *("run", "replica", "rank", "stage", "tp_rank", "site", "shard", "axis", "step_id", "position"),
    *("request", "dtype", "shape", "epoch", "row_seq"),
)
DROPPED: Final = "dropped"
"""It was computed in a step that found no free slab, of which nothing was kept."""
NOT_TAKEN: Final = "not_taken"
"""It was computed, and no row of it is stored: no rule took it, or it was lost on its way (`insitu stalls`)."""
NOT_COMPUTED: Final = "not_computed"
"""No step on record computed it: its keys and values came from a prefix cache, or its steps have gone."""
PART_MISSING: Final = "part_missing"
"""Some tensor-parallel rank's part of it is not stored."""

Ref = Mapping[str, Any] | tuple[Any, ...]
"""A row of `captures()` (its `epoch` and `row_seq` say which), or (request, site), or (request, site, step or range of
positions)."""


@dataclass(frozen=True, slots=True)
class SiteTensor:
    """Rows of one request at one site, each position once, in order."""

    values: Any
    """[positions, width]; of numpy, or torch where that was asked for."""
    positions: Int64
    """int64[positions]: token positions in the request."""
    places: NDArray[np.int32] | None = None
    """[positions, k]: where in its row each value stood, where only the largest were kept."""
    missing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Positions up to the last that was computed which are not here, by reason."""
    unlike: tuple[int, ...] = ()
    """Positions at which ranks that hold the site whole differ; the lowest rank's rows are given."""
    is_view: bool = False
    """The values are a segment's own bytes, mapped."""


class Answers(Protocol):
    """What answers questions about rows: of a folder, or of a collector."""

    @property
    def directory(self) -> Directory: ...

    def batches(self, table: str, asked: Asked) -> Iterator[pa.RecordBatch]: ...

    def table(self, table: str, asked: Asked) -> pa.Table: ...


class PayloadSource(Protocol):
    """What has the values of rows, by (epoch, row_seq)."""

    def pieces(self, rows: Sequence[tuple[int, int]]) -> list[Piece]: ...

    def row(self, epoch: int, row_seq: int) -> tuple[dict[str, Any], Piece]: ...


class Tensors:
    """Reads tensors of one store."""

    def __init__(self, reading: Callable[[], Answers], payloads: PayloadSource) -> None:
        """reading: is asked where more than a row's own number says is needed."""
        self._reading = reading
        self._payloads = payloads

    @cached_property
    def _rows(self) -> Answers:
        return self._reading()

    def tensor(self, ref: Ref, asked: Asked, *, torch: bool = False) -> Any:
        """Return one row in its shape, or the rows there are [positions, width] of a request at one site.

        Raises BadQuestion, NothingFound where there is no such row.
        """
        if isinstance(ref, Mapping):
            return self._one_row(ref, torch=torch)
        question, positions = _question(ref, asked)
        found = self.tensors(question, torch=torch)
        if len(found) > 1:
            raise BadQuestion(f"{ref[1]!r} means {len(found)} sites here: {', '.join(found)}; tensors() gives them all")
        (only,) = found.values()
        if positions is None:
            return only.values
        inside = np.flatnonzero((only.positions >= positions.start) & (only.positions < positions.stop))
        return only.values[inside[0] : inside[-1] + 1] if len(inside) else only.values[:0]

    def tensors(self, asked: Asked, *, torch: bool = False) -> dict[str, SiteTensor]:
        """Return the rows of a request at each site that is meant. Raises BadQuestion, NothingFound without any."""
        if asked.request is None:
            raise BadQuestion("tensors are of one request; say which with request=...")
        rows = self._rows.table("captures", replace(asked, columns=COLUMNS))
        if not rows.num_rows:
            where = f" at {asked.site}" if asked.site else ""
            raise NothingFound(f"no captured row of request {asked.request!r}{where}; captures() lists what there is")
        _check_one_place(rows, asked.request)
        computed = self._computed(asked, rows)
        found: dict[str, SiteTensor] = {}
        for site in pc.unique(rows["site"]).to_pylist():
            mine = rows.filter(pc.equal(rows["site"], site)).to_pylist()
            shard = self._shard(asked, mine[0])
            made = self._merged(shard, mine, torch)
            expected = computed.of_axis(mine[0]["axis"])
            found[site] = replace(made, missing=_missing(made, expected, computed.dropped))
        return found

    # -- one row ---------------------------------------------------------------------------------------------------

    def _one_row(self, ref: Mapping[str, Any], *, torch: bool) -> Any:
        try:
            epoch, row_seq = int(ref["epoch"]), int(ref["row_seq"])
        except (KeyError, TypeError, ValueError):
            raise BadQuestion(
                "a captured row is known by its `epoch` and `row_seq`, as captures() gives them"
            ) from None
        row, piece = self._payloads.row(epoch, row_seq)
        name, values, places = split(row["dtype"], piece.read()[None, :])
        array = array_of(name, values, torch=torch)
        return array.reshape(tuple(row["shape"])) if places is None else (array[0], places[0])

    # -- many ------------------------------------------------------------------------------------------------------

    def _shard(self, asked: Asked, row: Mapping[str, Any]) -> Shard:
        ranks = _tp_ranks(self._rows.directory, row) if asked.rank is None else (row["tp_rank"] or 0,)
        return Shard(row["site"], row["shard"] or "replicated", ranks)

    def _merged(self, shard: Shard, rows: list[dict[str, Any]], torch: bool) -> SiteTensor:
        shard.check(rows[0]["dtype"])
        kinds = {row["dtype"] for row in rows}
        if len(kinds) > 1:
            raise BadQuestion(f"{shard.site} was kept as {' and '.join(sorted(kinds))}; ask for steps=... of one")
        chosen, partly = _chosen(shard, rows)
        positions = np.array(sorted(chosen), np.int64)
        ranks = sorted({rank for parts in chosen.values() for rank in parts})
        if not shard.needed():  # whole on each: those of which every position is there are compared
            ranks = [rank for rank in ranks if all(rank in parts for parts in chosen.values())] or []
        missing = {PART_MISSING: tuple(sorted(partly))} if partly else {}
        width = item_bytes(rows[0]["dtype"])
        if not len(positions):
            return SiteTensor(array_of_none(rows[0]["dtype"], torch), positions, missing=missing)
        if ranks:
            stacked = {rank: self._stacked([chosen[int(at)][rank] for at in positions]) for rank in ranks}
            values, unlike = merged(shard, {rank: found for rank, (found, _) in stacked.items()})
            is_view = len(ranks) == 1 or not shard.needed()
            is_view = is_view and stacked[ranks[0]][1]
        else:
            values, is_view = self._stacked([chosen[int(at)][min(chosen[int(at)])] for at in positions])
            unlike = np.zeros(0, np.int64)
        assert values.shape[1] % width == 0, "a row is whole values"
        name, kept, places = split(rows[0]["dtype"], values)
        array = array_of(name, kept, torch=torch)
        same = places is None and not torch and np.shares_memory(array, values)
        is_view = is_view and (same or (torch and array.data_ptr() == values.ctypes.data))
        return SiteTensor(array, positions, places, missing, tuple(positions[unlike].tolist()), bool(is_view))

    def _stacked(self, rows: list[dict[str, Any]]) -> tuple[Bytes, bool]:
        pieces = self._payloads.pieces([(row["epoch"], row["row_seq"]) for row in rows])
        sizes = {piece.end - piece.start for piece in pieces}
        if len(sizes) > 1:
            raise BadQuestion(f"{rows[0]['site']} has rows of several widths; ask for steps=... of one")
        data, is_view = joined(pieces)
        return data.reshape(len(rows), -1), is_view

    # -- what there should be --------------------------------------------------------------------------------------

    def _computed(self, asked: Asked, rows: pa.Table) -> _Computed:
        """Return which positions of the request the steps on record computed."""
        replica = rows["replica"][0].as_py()
        of = Asked(run=asked.run, replica=replica, steps=asked.steps, columns=("step_id", "dropped", "rows"))
        return _Computed.of(_entries(self._rows.batches("steps", of), str(asked.request)))


@dataclass(frozen=True, slots=True)
class _Computed:
    """Positions of a request that steps computed: of which a row is at sites of each axis, and of dropped steps."""

    tokens: frozenset[int]
    samples: frozenset[int]
    dropped: frozenset[int]

    @classmethod
    def of(cls, entries: Iterable[tuple[dict[str, Any], bool]]) -> _Computed:
        tokens: set[int] = set()
        samples: set[int] = set()
        dropped: set[int] = set()
        for entry, was_dropped in entries:
            covers = range(entry["position"], entry["position"] + entry["count"])
            tokens.update(covers)
            if entry["sample_row"] >= 0 and entry["count"]:
                samples.add(covers[-1])
            if was_dropped:
                dropped.update(covers)
        return cls(frozenset(tokens), frozenset(samples), frozenset(dropped))

    def of_axis(self, axis: str | None) -> tuple[frozenset[int], bool]:
        """Return the positions there should be rows of, and whether those before them should be there too."""
        if axis == "tokens":
            return self.tokens, True
        return (self.samples, False) if axis == "samples" else (frozenset(), False)


def _entries(batches: Iterable[pa.RecordBatch], request: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the entries of row maps that name a request, and whether nothing of their step was kept."""
    for batch in batches:
        lists = batch["rows"]
        flat = lists.flatten()
        if not len(flat):
            continue
        of_step = np.repeat(np.arange(len(lists)), np.asarray(pc.list_value_length(lists).fill_null(0)))
        mine = np.flatnonzero(np.asarray(pc.fill_null(pc.equal(flat.field("request"), request), False)))
        dropped = np.asarray(batch["dropped"].fill_null(0))
        for at, entry in zip(mine.tolist(), flat.take(pa.array(mine)).to_pylist(), strict=True):
            yield entry, bool(dropped[of_step[at]])


def _missing(
    made: SiteTensor, expected: tuple[frozenset[int], bool], dropped: frozenset[int]
) -> Mapping[str, tuple[int, ...]]:
    computed, from_zero = expected
    here = set(made.positions.tolist())
    partly = made.missing.get(PART_MISSING, ())
    absent = computed - here - set(partly)
    found = {
        PART_MISSING: partly,
        DROPPED: tuple(sorted(absent & dropped)),
        NOT_TAKEN: tuple(sorted(absent - dropped)),
    }
    if from_zero and computed:
        found[NOT_COMPUTED] = tuple(sorted(set(range(max(computed))) - computed - here))
    return {reason: positions for reason, positions in found.items() if positions}


def _chosen(shard: Shard, rows: list[dict[str, Any]]) -> tuple[dict[int, dict[int, dict[str, Any]]], set[int]]:
    """Return position -> rank -> its row, of the last step that has all it needs; and positions that have no such."""
    by_position: dict[int, dict[int, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        of_step = by_position.setdefault(row["position"], {}).setdefault(row["step_id"], {})
        of_step.setdefault(row["tp_rank"] or 0, row)
    chosen: dict[int, dict[int, dict[str, Any]]] = {}
    for position, steps in by_position.items():
        whole = [step for step, parts in steps.items() if set(parts) >= set(shard.needed())]
        if whole:
            chosen[position] = steps[max(whole)]
    return chosen, set(by_position) - set(chosen)


def _tp_ranks(directory: Directory, row: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tensor-parallel ranks of a row's stage."""
    process = directory.processes.get(row["epoch"])
    if process is None:
        return (row["tp_rank"] or 0,)
    found = {
        each.tp_rank or 0
        for each in directory.processes.values()
        if each.is_rank and each.group == process.group and each.stage == process.stage
    }
    return tuple(sorted(found))


def _check_one_place(rows: pa.Table, request: str) -> None:
    """Raise BadQuestion where one name means several requests."""
    for column, say in (("run", 'run="..."'), ("replica", "replica=...")):
        found = pc.unique(rows[column]).to_pylist()
        if len(found) > 1:
            several = ", ".join(str(each) for each in found)
            raise BadQuestion(f"request {request!r} is in several {column}s ({several}); say which with {say}")


def _question(ref: tuple[Any, ...], asked: Asked) -> tuple[Asked, range | None]:
    is_named = isinstance(ref, tuple) and len(ref) in (2, 3) and all(isinstance(each, str) for each in ref[:2])
    if not is_named or not (len(ref) == 2 or isinstance(ref[2], Integral | range)):
        raise BadQuestion(f"{ref!r} names no rows; give (request, site), or a step or range of positions after them")
    found = replace(asked, request=ref[0], site=ref[1])
    if len(ref) == 2:
        return found, None
    if isinstance(ref[2], range):
        return found, ref[2]
    return replace(found, steps=int(ref[2])), None


def array_of_none(dtype: str, torch: bool) -> Any:
    """Return an array of no rows."""
    return array_of(dtype.partition("+")[0], np.zeros((0, item_bytes(dtype)), np.uint8), torch=torch)
