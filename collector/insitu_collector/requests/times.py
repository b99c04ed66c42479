"""Requests through their steps: which spans of time each one's records claim. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.vocabulary import Phase, RequestClass, RequestEvent
from insitu_collector.clocks.timeline import Int64
from insitu_collector.requests.cover import expand
from insitu_collector.requests.ledger import NOBODY, PLACE, SPAN, RequestLedger, exclusive
from insitu_collector.requests.lives import lives_of, state_spans
from insitu_collector.requests.records import RequestRecords, of_other_replicas
from insitu_collector.rows.row_maps import WARMUP_PREFIX
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.work import StepWork, doings, step_work, typical_ns

Bool = NDArray[np.bool_]

_NEVER: Final = np.iinfo(np.int64).min


def request_ledger(records: RequestRecords, window: tuple[int, int] | None = None) -> RequestLedger:
    """Return the ledger of all requests but those of warm-up; `window` cuts their lives to [t0_ns, t1_ns)."""
    times = RequestTimes(records)
    return times.ledger(0, len(times), window)


class RequestTimes:
    """Everything that is shared between requests, so that many can be read a stretch at a time."""

    def __init__(self, records: RequestRecords) -> None:
        self.work = step_work(records.intervals, records.stages)
        names, event_of, entry_of = _codes(records)
        entries = _sorted_entries(records.entries, entry_of, self.work)
        self._decoding, self._prefill = _rows_of_steps(entries, len(self.work.step))
        entries = {name: column[entries["at"] >= 0] for name, column in entries.items()}
        worked_until = np.full(len(names), _NEVER)
        np.maximum.at(worked_until, entries["at"], _ends(entries, self.work))
        first_seen = np.full(len(names), np.iinfo(np.int64).max)
        np.minimum.at(first_seen, entries["at"], entries["t"])
        self.lives = lives_of(names, records.events, event_of, first_seen, records.until_ns)
        self._entries = entries
        self._states = state_spans(self.lives, worked_until, records.until_ns, lossy=records.lossy)
        typical = typical_ns(self.work, self._decoding, self._prefill)
        busy = np.maximum(self.work.busy_ns, 1)
        self._beside = (self._decoding > 0) & (self._prefill > 0)
        self._unsplit = self._beside & np.isnan(typical)
        self._share = np.nan_to_num(np.clip(1.0 - typical / busy, 0.0, 1.0))
        self._wait_pieces(records)

    def __len__(self) -> int:
        return len(self.lives.names)

    def _wait_pieces(self, records: RequestRecords) -> None:
        """Find what ranks did while steps waited for them: between two steps, and before the first."""
        work, place = self.work, self._entries["place"]
        self._linked = _links(self._entries, work.passed)
        pairs = np.stack([place[self._linked], place[self._linked + 1]])
        (before, after), pair_of = np.unique(pairs, axis=1, return_inverse=True)
        self._pair_of = pair_of.reshape(-1)

        def meanwhile(place: Int64, since_ns: Int64) -> Columns:
            rank, begin, step = (column[place] for column in (work.first_rank, work.begin, work.step))
            return doings(records.intervals, records.stages, rank, since_ns, begin, step)

        self._inside = {**work.waits, "of": work.waits["at"]}
        self._meanwhile = meanwhile(after, work.end[before])
        entry, since_ns = self._anchors()
        self._before = meanwhile(place[entry], since_ns)
        self._before["of"] = entry[self._before["of"]]

    def _anchors(self) -> tuple[Int64, Int64]:
        """Return the entries with which a request begins to run, by an event that names their step; and since when."""
        control, num_steps = self.lives.control, len(self.work.step) + 1
        begins = np.isin(control["event"], (RequestEvent.SCHEDULED, RequestEvent.RESUMED))
        at, t_ns, place = control["at"][begins], control["t"][begins], self.work.find(control["step"][begins])
        keys, wanted = self._entries["at"] * num_steps + self._entries["place"], at * num_steps + place
        entry = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
        known = (place >= 0) & (keys[entry] == wanted) if len(keys) else np.zeros(len(at), bool)
        known[known] &= self.work.passed[place[known]]
        return entry[known], t_ns[known]

    # -- a stretch of requests -----------------------------------------------------------------------------------

    def ledger(self, low: int, high: int, window: tuple[int, int] | None = None) -> RequestLedger:
        """Return the ledger of requests `low .. high - 1`; `window` cuts their lives to [t0_ns, t1_ns)."""
        lives = self.lives
        first, last = np.searchsorted(self._entries["at"], [low, high])
        begin, end = lives.begin[low:high], lives.end[low:high]
        if window is not None:
            begin, end = np.clip(begin, *window), np.clip(end, *window)
        parts = self._claims(int(first), int(last), low, high)
        claims = {name: np.concatenate([part[name] for part in parts]) for name in SPAN}
        claims["at"] -= low
        return RequestLedger(
            names=tuple(lives.names[low:high]),
            begin_ns=begin,
            end_ns=end,
            first_token_ns=lives.first_token[low:high],
            arrived=lives.arrived[low:high],
            ended=lives.ended[low:high],
            spans=exclusive(claims, begin, end),
            unsplit_ns=self._unsplit_ns(int(first), int(last)),
        )

    def _unsplit_ns(self, first: int, last: int) -> int:
        place = self._entries["place"][first:last][self._entries["phase"][first:last] == Phase.DECODE]
        place = place[place >= 0]
        return int(self.work.busy_ns[place[self._unsplit[place]]].sum())

    def _claims(self, first: int, last: int, low: int, high: int) -> list[Columns]:
        """Return every span that something on record claims for some requests and their entries `first .. last - 1`."""
        entries = {name: column[first:last] for name, column in self._entries.items()}
        known = entries["place"] >= 0
        links = slice(*np.searchsorted(self._linked, [first, last]))
        after = self._linked[links] + 1
        begins = slice(*np.searchsorted(self._before["of"], [first, last]))
        states = slice(*np.searchsorted(self._states["at"], [low, high]))
        return [
            {name: column[states] for name, column in self._states.items()},
            self._waited({name: column[begins] for name, column in self._before.items()}, self._before["of"][begins]),
            self._waited(*_each(self._meanwhile, self._pair_of[links], after)),
            self._waited(
                *_each({**self.work.waits, "of": self.work.waits["at"]}, entries["place"], np.arange(first, last))
            ),
            *self._worked({name: column[known] for name, column in entries.items()}),
        ]

    def _waited(self, doing: Columns, entry: Int64) -> Columns:
        """Return spans in which requests waited for a rank (`entry`: for which step of whom), or it worked for them."""
        at, phase = self._entries["at"][entry], self._entries["phase"][entry]
        own = doing["own"] > 0
        cls = np.where(own, _of_phase(phase), PLACE[RequestClass.PIPELINE_WAIT])
        claim = _claim(at, doing["begin"], doing["end"], cls)
        claim |= {"rank": np.where(own, NOBODY, doing["rank"]), "doing": np.where(own, NOBODY, doing["cls"])}
        return {name: column[cls >= 0] for name, column in claim.items()}

    def _worked(self, entries: Columns) -> list[Columns]:
        """Return the spans in which a rank worked on a request's step; a decode step's excess at the end of each."""
        of, piece = _members(self.work.work["at"], entries["place"])
        begin, end = self.work.work["begin"][piece], self.work.work["end"][piece]
        at, phase, place = entries["at"][of], entries["phase"][of], entries["place"][of]
        share = np.where(phase == Phase.DECODE, self._share[place], 0.0)
        cut = end - ((end - begin) * share).astype(np.int64)
        cls = _of_phase(phase)
        known = cls >= 0
        excess = np.full(len(at), PLACE[RequestClass.INTERFERENCE])
        return [
            _claim(at[known], begin[known], cut[known], cls[known]),
            _claim(at[known], cut[known], end[known], excess[known]),
        ]

    def token_gaps(self) -> Columns:
        """Return, for each next token of a request, `t` (its end), `ns` since the one before, and `mixed`: whether
        its step carried prompts of others."""
        entries = self._entries
        after = self._linked + 1
        after = after[entries["phase"][after] == Phase.DECODE]
        ends = self.work.end[entries["place"][after]]
        return {
            "t": ends,
            "ns": ends - self.work.end[entries["place"][after - 1]],
            "mixed": self._beside[entries["place"][after]],
        }

    def mixed_steps(self, t0_ns: int, t1_ns: int) -> Columns:
        """Return the steps that began in a window and decode beside prompts: `ns`, `typical_ns` of such without
        prompts, `decoding` and `prefill` rows. Of those for which a typical time is known."""
        work = self.work
        kept = self._beside & ~self._unsplit & (work.begin >= t0_ns) & (work.begin < t1_ns)
        ns = work.busy_ns[kept].astype(np.float64)
        return {
            "ns": ns,
            "typical_ns": typical_ns(work, self._decoding, self._prefill)[kept],
            "decoding": self._decoding[kept],
            "prefill": self._prefill[kept],
        }


def _sorted_entries(entries: Columns, at: Int64, work: StepWork) -> Columns:
    """Return row map entries by request and step, with `at` (whose) and `place` (the step's, -1 if nobody worked)."""
    found = {name: column for name, column in entries.items() if name != "request"}
    found |= {"at": at, "place": work.find(entries["step"])}
    order = np.lexsort((found["step"], at))
    return {name: column[order] for name, column in found.items()}


def _rows_of_steps(entries: Columns, num_steps: int) -> tuple[Int64, Int64]:
    """Return the decoding and the prompt rows of each step; none of a step in which warm-up has a part."""
    place = entries["place"]
    known = place >= 0
    rows = []
    for phase in (Phase.DECODE, Phase.PREFILL):
        count = np.where(entries["phase"] == phase, entries["count"], 0)
        rows.append(np.bincount(place[known], count[known], num_steps).astype(np.int64))
    warmup = np.bincount(place[known & (entries["at"] < 0)], minlength=num_steps) > 0
    rows[0][warmup] = rows[1][warmup] = 0
    return rows[0], rows[1]


def _ends(entries: Columns, work: StepWork) -> Int64:
    """Return until when each entry's step is known to have lasted."""
    ends = entries["t"].copy()
    known = entries["place"] >= 0
    ends[known] = np.maximum(ends[known], work.end[entries["place"][known]])
    return ends


def _links(entries: Columns, passed: Bool) -> Int64:
    """Return the entries that the next one follows without a gap: the next positions of one request, both steps passed.

    A step that is missing in between would leave a hole in the positions, a preemption begins them again.
    """
    follows = entries["at"][1:] == entries["at"][:-1]
    follows &= entries["position"][1:] == entries["position"][:-1] + entries["count"][:-1]
    known = entries["place"] >= 0
    known[known] &= passed[entries["place"][known]]
    return np.flatnonzero(follows & known[1:] & known[:-1])


def _members(of: Int64, wanted: Int64) -> tuple[Int64, Int64]:
    """Return, for each wanted number, the places at which the sorted `of` has it: (which wanted one, place)."""
    low, high = np.searchsorted(of, wanted, "left"), np.searchsorted(of, wanted, "right")
    return expand(low, high - low)


def _each(doing: Columns, wanted: Int64, entry: Int64) -> tuple[Columns, Int64]:
    """Return what was done meanwhile, once for each entry that waited for it, and those entries."""
    row, piece = _members(doing["of"], wanted)
    return {name: column[piece] for name, column in doing.items()}, entry[row]


def _of_phase(phase: Int64) -> Int64:
    """Return the class of work in a phase; -1 for a phase this version does not know."""
    cls = np.full(len(phase), -1)
    cls[phase == Phase.PREFILL] = PLACE[RequestClass.PREFILL]
    cls[phase == Phase.DECODE] = PLACE[RequestClass.DECODE]
    return cls


def _claim(at: Int64, begin: Int64, end: Int64, cls: Int64) -> Columns:
    nobody = np.full(len(at), NOBODY)
    return {"at": at, "begin": begin, "end": end, "cls": cls, "rank": nobody, "doing": nobody}


def _codes(records: RequestRecords) -> tuple[list[str], Int64, Int64]:
    """Return the requests' names, and the place in them of each event and entry; -1 for warm-up, no name, and those
    of other replicas."""
    both = pa.array([*records.events["request"].tolist(), *records.entries["request"].tolist()], pa.utf8())
    encoded = both.dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    elsewhere = of_other_replicas(records.events, records.entries)
    wanted = np.array([not name.startswith(WARMUP_PREFIX) and name not in elsewhere for name in names], bool)
    number = np.append(np.where(wanted, np.cumsum(wanted) - 1, -1), -1)
    code = number[np.asarray(encoded.indices.fill_null(len(names)))]
    num_events = len(records.events["request"])
    return [name for name, kept in zip(names, wanted, strict=True) if kept], code[:num_events], code[num_events:]
