"""The demo's answer: one document, made of what each process reported, and the same in words. Pure."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from insitu_engine.demo_watch import QUIET

SCHEMA: Final = "insitu.demo/1"
WIDTH: Final = 110
"""Columns of a paragraph."""
SHOWN_S: Final = 0.005
"""A class with less time than this, over all ranks, is not worth a line to a person."""
OVERHEAD_HOW: Final = "self-measured: drain CPU + hook time / step time, on the rank where it is largest"
NO_FAULT: Final[dict[str, Any]] = {
    "kind": "none",
    **dict.fromkeys(("stage", "rank", "layer", "step", "ms", "unix_ns")),
}
VERDICT_FIELDS: Final = (
    "kind", "stage", "rank", "layer", "site", "step", "phase", "confidence", "text", "remedy",
    "window_unix_ns", "detected_unix_ns", "num_requests", "requests",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """What the processes of one run said of themselves, as their JSON has it."""

    load: Mapping[str, Any]
    """`insitu.load/1`."""
    sources: Sequence[Mapping[str, Any]]
    """The sessions' own accounts (`insitu.session.accounts.Stats.to_json`), one a process."""
    stalls: Mapping[str, Any]
    """`insitu.stalls/1`."""
    faults: Sequence[Mapping[str, Any]]
    """The injector's log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What was run, where, and how long it took."""

    seed: int
    model: str
    num_stages: int
    device: str
    store: str
    start_to_ready_s: float
    ready_unix_ns: int
    first_seen_unix_ns: Mapping[tuple[Any, ...], int]
    """`verdict_key` -> when the demo could read the verdict in the store."""


def verdict_key(kind: str, stage: int | None, rank: int | None, detected_unix_ns: int) -> tuple[Any, ...]:
    """Return what tells one verdict of a run from the others, in a table's row and in the document alike."""
    return kind, stage, rank, detected_unix_ns


def document(setting: Setting, reports: Reports) -> dict[str, Any]:
    """Return the document of `insitu demo --json` (docs/contracts.md)."""
    verdicts = [{name: verdict[name] for name in VERDICT_FIELDS} for verdict in reports.stalls["verdicts"]]
    shares = [float(source["overhead_share"]) for source in reports.sources if source["role"] == "rank"]
    answer = {
        "schema": SCHEMA,
        "seed": setting.seed,
        "model": setting.model,
        "stages": setting.num_stages,
        "device": setting.device,
        "start_to_ready_s": round(setting.start_to_ready_s, 3),
        "ready_to_verdict_s": ready_to_verdict_s(setting, verdicts),
        "requests": {"completed": int(reports.load["completed"]), "failed": int(reports.load["failed"])},
        "tokens_per_s": float(reports.load["tokens_per_s"]),
        "fault": NO_FAULT,
        "verdicts": verdicts,
        "revised": int(reports.stalls["revised"]),
        "ledger_window_unix_ns": reports.stalls["ledger_window_unix_ns"] or [0, 0],
        "ledger": ledger_rows(reports.stalls["ledger"]),
        "records": records(reports.sources, **reports.stalls["records"]),
        "overhead": {"share": round(max(shares, default=0.0), 5), "how": OVERHEAD_HOW},
        "store": setting.store,
    }
    faults = faults_done(reports.faults)
    if faults:
        answer["fault"] = {name: faults[0][name] for name in NO_FAULT}
    if len(faults) > 1:
        answer["faults"] = faults
    return answer


def faults_done(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what was done, in order of time: `fault` of the document, with `end_unix_ns` (null: to the end)."""
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in sorted(log, key=lambda line: (int(line["unix_ns"]), line["event"])):
        fault = {name: line.get(name) for name in (*NO_FAULT, "end_unix_ns")}
        done[tuple(fault[name] for name in NO_FAULT)] = fault
    return list(done.values())


def ledger_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a (rank, class): the finer rows of `insitu stalls` also say whom a wait waits for."""
    seconds: dict[tuple[int, int, str], float] = {}
    for row in rows:
        key = int(row["stage"]), int(row["rank"]), str(row["class"])
        seconds[key] = seconds.get(key, 0.0) + float(row["seconds"])
    return [{"stage": key[0], "rank": key[1], "class": key[2], "seconds": value} for key, value in seconds.items()]


def ready_to_verdict_s(setting: Setting, verdicts: Sequence[Mapping[str, Any]]) -> float | None:
    """Return how long after the engine was ready the first verdict that stands could be read; None without any.

    Where something was found, `healthy` and `inconclusive` do not count.
    """
    found = [verdict for verdict in verdicts if verdict["kind"] not in QUIET] or verdicts
    seen = []
    for verdict in found:
        detected = int(verdict["detected_unix_ns"])
        key = verdict_key(verdict["kind"], verdict["stage"], verdict["rank"], detected)
        seen.append(setting.first_seen_unix_ns.get(key, detected))
    return round((min(seen) - setting.ready_unix_ns) / 1e9, 3) if seen else None


def records(
    sources: Sequence[Mapping[str, Any]], stored: Mapping[str, int], **gone: Mapping[str, int]
) -> dict[str, Any]:
    """Return produced, stored and dropped rows in all and by table. gone: rows by table that `expired` or are `erased`.

    Those are in it only if there are any.
    """
    produced: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    dropped_of: Counter[str] = Counter()
    for source in sources:
        produced.update(source["produced"])
        for table, reasons in source["dropped"].items():
            dropped.update(reasons)
            dropped_of[table] += sum(reasons.values())
    tables = {
        table: {"produced": produced[table], "stored": int(stored.get(table, 0)), "dropped": dropped_of[table]}
        | {why: rows[table] for why, rows in gone.items() if table in rows}
        for table in sorted({*produced, *stored, *dropped_of})
        if produced[table] or stored.get(table) or dropped_of[table]
    }
    return {
        "produced": produced.total(),
        "stored": sum(int(rows) for rows in stored.values()),
        "dropped": dict(dropped),
        "tables": tables,
        **{why: sum(rows.values()) for why, rows in gone.items() if rows},
    }


def render(answer: Mapping[str, Any], command: str = "insitu") -> str:
    """Return the answer in words: the verdicts, the ledger as a table, the account, the store and what to do next.

    command: what a person types for `insitu`.
    """
    parts = ["", *(_verdict(verdict) for verdict in answer["verdicts"])]
    if not answer["verdicts"]:
        parts.append("no verdict: there was too little traffic to judge")
    if answer["ledger"]:
        parts += ["", _ledger(answer)]
    kept = answer["records"]
    num_dropped = sum(kept["dropped"].values())
    parts += [
        "",
        f"requests  {answer['requests']['completed']} answered, {answer['requests']['failed']} failed, "
        f"{answer['tokens_per_s']:.0f} tokens/s",
        f"records   {kept['produced']:,} produced, {kept['stored']:,} stored, {num_dropped:,} dropped"
        f"{_reasons(kept['dropped'])}{_expired(kept)}; "
        f"the probe took {100 * answer['overhead']['share']:.2g} % of step time",
        f"store     {answer['store']}",
        f"next      {command} stalls {answer['store']}",
    ]
    return "\n".join(parts)


def _reasons(dropped: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{reason} {rows:,}' for reason, rows in dropped.items())})" if dropped else ""


def _expired(kept: Mapping[str, Any]) -> str:
    return f", {kept['expired']:,} expired" if kept.get("expired") else ""


def _verdict(verdict: Mapping[str, Any]) -> str:
    parts = {"verdict": f"{verdict['text']} (confidence {verdict['confidence']:.2f})"}
    if verdict["num_requests"]:
        named = ", ".join(verdict["requests"][:3])
        more = verdict["num_requests"] - min(3, len(verdict["requests"]))
        parts["requests"] = f"{verdict['num_requests']} touched: {named}{f' and {more} more' if more else ''}"
    if verdict["remedy"]:
        parts["remedy"] = verdict["remedy"]
    return "\n".join(_labelled(label, text) for label, text in parts.items())


def _labelled(label: str, text: str) -> str:
    """Return a paragraph with its label in the margin."""
    return textwrap.fill(text, WIDTH, initial_indent=f"{label:<10}", subsequent_indent=" " * 10, break_long_words=False)


def _ledger(answer: Mapping[str, Any]) -> str:
    """Return a table: classes down, ranks across, each cell the share of the window and its seconds."""
    begin, end = answer["ledger_window_unix_ns"]
    window_s = (end - begin) / 1e9
    ranks = sorted({(row["stage"], row["rank"]) for row in answer["ledger"]})
    seconds: Counter[tuple[str, int]] = Counter()
    for row in answer["ledger"]:
        seconds[row["class"], row["rank"]] += row["seconds"]
    total = Counter[str]()
    for (cls, _), value in seconds.items():
        total[cls] += value
    classes = [cls for cls, value in total.most_common() if value >= SHOWN_S or cls == "unrecorded"]
    head = "".join(f"{f'stage {stage}, rank {rank}':>20}" for stage, rank in ranks)
    lines = [f"where {window_s:.1f} s went  {head.removeprefix(' ' * 3)}"]
    for cls in classes:
        cells = "".join(_cell(seconds[cls, rank], window_s) for _, rank in ranks)
        lines.append(f"  {cls:<16}{cells}")
    return "\n".join(lines)


def _cell(seconds: float, window_s: float) -> str:
    return f"{seconds:>11.2f} s {100 * seconds / window_s if window_s else 0:>4.0f} %"
