"""Whether an answer to a trial is right. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

EXPECTED: Final = {
    "kv": "kv_starved",
    "prefill": "prefill_delays_decode",
    "underfilled": "pipeline_underfilled",
    "contended": "host_contended",
    "fail-slow": "fail_slow",
}
"""Kind of trial -> the one verdict that may be there besides the quiet ones, and must."""
VERDICT_OF: Final = {"slow_stage": "stage_limits", "gc": "gc_pause", "hang": "stuck", "nan": "first_nonfinite"}
"""Fault -> the verdict that names it."""
LOCATED: Final = frozenset(VERDICT_OF.values())
QUIET: Final = frozenset({"healthy", "inconclusive"})
MIN_FOREIGN_SHARE: Final = 0.05
"""Of all cores: foreign work above this is contention that can be measured, and may make an answer inconclusive."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a document is worth."""

    right: bool
    wrong: list[str] = field(default_factory=list)
    """What it names that is not there: none of these may ever happen."""
    missed: list[str] = field(default_factory=list)
    """What it should have said and did not."""


def rule(
    document: Mapping[str, Any],
    foreign_share: float,
    kind: str = "none",
    done: Sequence[Mapping[str, Any]] | None = None,
) -> Ruling:
    """Judge an answer against what was done: what the injector logged, unless `done` says it."""
    faults = faults_of(document) if done is None else done
    if kind in EXPECTED:
        wrong, missed = _rule_expected(document, EXPECTED[kind], foreign_share, faults)
    else:
        wrong, missed = _rule_faults(document, foreign_share, faults)
    if document["revised"]:
        missed.append(f"{document['revised']} verdicts were withdrawn")
    return Ruling(not wrong and not missed, wrong, missed)


def _rule_faults(
    document: Mapping[str, Any], foreign_share: float, faults: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """Each fault must be named where it was done, and nothing else."""
    verdicts = document["verdicts"]
    wrong = [_told(verdict) for verdict in verdicts if not _is_of_some(verdict, faults)]
    missed = [miss for fault in faults for miss in _missed(fault, verdicts)]
    kinds = {verdict["kind"] for verdict in verdicts}
    if not faults:
        missed += _missed_without_fault(verdicts, foreign_share)
    if "inconclusive" in kinds and foreign_share < MIN_FOREIGN_SHARE:
        missed.append(f"inconclusive, though foreign work took only {100 * foreign_share:.0f} % of the cores")
    return wrong, missed


def _rule_expected(
    document: Mapping[str, Any], expected: str, foreign_share: float, done: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[str]]:
    """One verdict must be there, about the one rank to which something was done or else about none, and in its time."""
    ranks = {fault["rank"] for fault in done}
    rank = ranks.pop() if len(ranks) == 1 else None
    named = [verdict for verdict in document["verdicts"] if (verdict["kind"], verdict["rank"]) == (expected, rank)]
    allowed = QUIET | ({"host_contended"} if foreign_share >= MIN_FOREIGN_SHARE else set())
    others = [verdict for verdict in document["verdicts"] if verdict not in named and verdict["kind"] not in allowed]
    missed = [f"no {expected}"] if not named else _missed_in_time(expected, named, done, allowed)
    return [_told(verdict) for verdict in others], missed


def _missed_in_time(
    expected: str, named: Sequence[Mapping[str, Any]], done: Sequence[Mapping[str, Any]], allowed: Set[str]
) -> list[str]:
    """What others did to the host too may be told before; it must go on then."""
    told = [verdict["detected_unix_ns"] for verdict in named]
    lasts = [verdict["window_unix_ns"][1] if expected in allowed else verdict["detected_unix_ns"] for verdict in named]
    if done and max(lasts) < min(fault["unix_ns"] for fault in done):
        return [f"{expected} was told before it was done"]
    ends = [end for fault in done if (end := fault.get("end_unix_ns")) is not None]
    if done and len(ends) == len(done) and min(told) > max(ends):
        return [f"{expected} was told {(min(told) - max(ends)) / 1e9:.1f} s after it was over"]
    return []


def faults_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the faults of a document; one may be all there is."""
    if document["fault"]["kind"] == "none":
        return []
    return list(document.get("faults", [document["fault"]]))


def _is_of_some(verdict: Mapping[str, Any], faults: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a verdict names a place where something was done; what names no place cannot be wrong about one."""
    if verdict["kind"] in QUIET or verdict["rank"] is None:
        return verdict["kind"] not in LOCATED
    places = [fault for fault in faults if (fault["stage"], fault["rank"]) == (verdict["stage"], verdict["rank"])]
    if verdict["kind"] == "first_nonfinite":
        return any(fault["kind"] == "nan" and fault["layer"] == verdict["layer"] for fault in places)
    return bool(places)


def _told(verdict: Mapping[str, Any]) -> str:
    place = f"stage {verdict['stage']} rank {verdict['rank']} layer {verdict['layer']}"
    return f"{verdict['kind']} at {place}: {verdict['text']}"


def _missed(fault: Mapping[str, Any], verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    kind = VERDICT_OF[fault["kind"]]
    named = [v for v in verdicts if v["kind"] == kind and (v["stage"], v["rank"]) == (fault["stage"], fault["rank"])]
    if kind == "first_nonfinite":
        named = [v for v in named if (v["layer"], v["step"]) == (fault["layer"], fault["step"])]
    where = f"stage {fault['stage']} rank {fault['rank']}"
    if not named:
        return [f"no {kind} for {fault['kind']} at {where}" + (f" step {fault['step']}" if fault["step"] else "")]
    if kind == "stuck":
        return _missed_in_stuck(fault, named)
    if not any(fault["unix_ns"] <= v["detected_unix_ns"] for v in named):
        return [f"{kind} at {where} was told before it was done"]
    return []


def _missed_in_stuck(fault: Mapping[str, Any], named: Sequence[Mapping[str, Any]]) -> list[str]:
    end_ns = fault["unix_ns"] + int(fault["ms"] * 1e6)
    in_time = [v for v in named if fault["unix_ns"] < v["detected_unix_ns"] < end_ns]
    if not in_time:
        late_s = (min(v["detected_unix_ns"] for v in named) - end_ns) / 1e9
        return [f"stuck at rank {fault['rank']} was stamped {late_s:.1f} s after the hang had ended"]
    if not any("wait" in v["text"] for v in in_time):
        return [f"stuck at rank {fault['rank']} does not say who waits for it"]
    return []


def _missed_without_fault(verdicts: Sequence[Mapping[str, Any]], foreign_share: float) -> list[str]:
    kinds = [verdict["kind"] for verdict in verdicts]
    if kinds == ["healthy"]:
        said = verdicts[0]["text"]
        return [] if any(c.isdigit() for c in said) and "ms" in said else [f"healthy without its limit: {said}"]
    if set(kinds) <= {"inconclusive", "host_contended"} and kinds and foreign_share >= MIN_FOREIGN_SHARE:
        return []
    return [f"no fault, and not healthy alone: {', '.join(kinds) or 'no verdict'}"]


def account_errors(document: Mapping[str, Any]) -> list[str]:
    """Return what does not add up in the record itself: rows, and time that has no class."""
    errors = [
        f"{table}: {rows['produced']} produced, {rows['stored']} stored, {rows['dropped']} dropped"
        for table, rows in document["records"]["tables"].items()
        if rows["produced"] != rows["stored"] + rows["dropped"]
    ]
    window_s = (document["ledger_window_unix_ns"][1] - document["ledger_window_unix_ns"][0]) / 1e9
    for rank in sorted({row["rank"] for row in document["ledger"]}):
        mine = {row["class"]: row["seconds"] for row in document["ledger"] if row["rank"] == rank}
        dark_s = mine.get("unrecorded", 0.0) + mine.get("other", 0.0)
        if dark_s > 0.05 * window_s:
            errors.append(f"rank {rank}: {dark_s:.2f} of {window_s:.1f} s are unrecorded")
        if abs(sum(mine.values()) - window_s) > 1e-3:
            errors.append(f"rank {rank}: its ledger sums to {sum(mine.values()):.3f} of {window_s:.3f} s")
    return errors
