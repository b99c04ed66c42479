"""`insitu stalls --if`: what a change would do to the run of a store, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import timeline_of
from insitu_collector.evidence import Evidence, Tables
from insitu_collector.requests.waiting import num_queued
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.times import step_times
from insitu_collector.verdicts.healthy import layers_by_stage
from insitu_collector.whatif.changes import NoPrediction, parse_changes
from insitu_collector.whatif.graph import StepGraph
from insitu_collector.whatif.predict import Prediction, WhatIf, recorded_graph, tokens_per_s

WINDOW_NS: Final = 20_000_000_000
"""How far back from its last step a run is replayed: what it was like in the end."""
UNRECORDED: Final = "it needs 12 steps of traffic through two or more stages, with every rank's intervals"


@dataclass(frozen=True, slots=True)
class Asked:
    """A change and what came of predicting it."""

    changes: tuple[str, ...]
    prediction: Prediction
    tokens_per_s: float
    """Before, while there was work."""
    first_token_s: float | None
    """Median before; None where requests waited for a place, which a replay of steps does not know."""

    def to_json(self) -> dict[str, Any]:
        """Return the part `prediction` of the document `insitu.stalls/1`."""
        found, first = self.prediction, self.first_token_s
        return {
            "if": list(self.changes),
            "throughput_ratio": round(found.throughput, 4),
            "error": round(found.error, 4),
            "residual": round(found.residual, 4),
            "tokens_per_s": {"before": self.tokens_per_s, "after": self.tokens_per_s * found.throughput},
            "steps_per_s": {"before": 1e9 / found.before_ns, "after": 1e9 / found.period_ns},
            "step_period_ns": {"before": round(found.before_ns), "after": round(found.period_ns)},
            "first_token_s": None if first is None else {"before": first, "after": first * found.cycle},
            "in_flight": found.in_flight,
            "num_steps": found.num_steps,
            "assumes": found.assumes,
        }

    def to_text(self) -> list[str]:
        """Return the same for people."""
        found, first = self.prediction, self.first_token_s
        tokens, percent = self.tokens_per_s, 100 * found.error
        lines = [
            f"If {' and '.join(self.changes)}: {tokens * found.throughput:.0f} tokens/s instead of {tokens:.0f} while "
            f"there is work ({found.throughput:.2f}x, within {percent:.0f} %), a step every "
            f"{found.period_ns / 1e6:.1f} ms instead of {found.before_ns / 1e6:.1f} ms."
        ]
        if first is not None:
            lines.append(f"  First token after {1e3 * first * found.cycle:.0f} ms instead of {1e3 * first:.0f} ms.")
        lines.append(
            f"  By replay of {found.num_steps} recorded steps, {found.in_flight} micro-batches in flight after the "
            f"change; unchanged it misses the record by {100 * found.residual:.1f} %. It assumes that {found.assumes}."
        )
        if not found.is_sure:
            lines.append("  The difference is no larger than what the replay misses, so nothing can be promised.")
        return lines


def ask(tables: Tables, texts: Sequence[str]) -> Asked:
    """Return what the changes would do together to one run and replica. Raises NoPrediction, one line."""
    change = parse_changes(texts)
    evidence = Evidence()
    evidence.add(tables)
    end = evidence.traffic_ns[1] + 1 if evidence.traffic_ns else 0
    found = what_if(evidence, end - WINDOW_NS, end)
    if found is None:
        raise Unrecorded(f"nothing can be predicted: {UNRECORDED}")
    prediction, graph = found.predict(change), found.graph
    before = tokens_per_s(graph) * graph.period_ns / prediction.before_ns
    return Asked(tuple(texts), prediction, before, first_token_s(tables, graph))


class Unrecorded(NoPrediction):
    """The change may be sound, but the store holds too little to say."""


def what_if(evidence: Evidence, t0_ns: int, t1_ns: int) -> WhatIf | None:
    """Return what changes can be asked of; None where a window holds no step graph."""
    graph = recorded_graph(evidence, t0_ns, t1_ns)
    if graph is None:
        return None
    costs, healthy = Baseline(), Baseline()
    for rank, times in step_times(evidence, 0).items():
        costs.learn(rank, times)
        healthy.learn(rank, times.only(times.warmup))
    waits = num_queued(evidence, int(graph.begin_ns[0, 0]), int(graph.begin_ns[-1, 0]))
    return WhatIf(graph, costs, healthy, layers_by_stage(evidence), waits)


def first_token_s(tables: Tables, graph: StepGraph) -> float | None:
    """Return the median time from arrival to first token of the graph's time.

    None without requests, and where they waited longer for a place than for a turn of their slot.
    """
    rows = tables.get("requests")
    if rows is None:
        return None
    arrived, scheduled, first = (
        _times(tables, rows, event)
        for event in (RequestEvent.ARRIVED, RequestEvent.SCHEDULED, RequestEvent.FIRST_TOKEN)
    )
    begin, end = int(graph.begin_ns[0, 0]), int(graph.begin_ns[-1, 0])
    told = [
        (scheduled.get(name, t) - arrived[name], t - arrived[name])
        for name, t in first.items()
        if begin <= t <= end and name in arrived
    ]
    if not told:
        return None
    queued, first_token = np.median(np.array(told, np.float64), axis=0)
    return None if queued > graph.num_slots * graph.period_ns else float(first_token) / 1e9


def _times(tables: Tables, rows: pa.Table, *events: RequestEvent) -> dict[str, int]:
    chosen = rows.filter(pc.is_in(rows["event"], pa.array([int(event) for event in events], pa.uint8())))
    moved = timeline_of(tables["sources"], tables.get("clocks")).moved(chosen, "t_ns").tolist()
    return dict(zip(chosen["request"].to_pylist(), moved, strict=True))
