"""Verdict `prefill_delays_decode`: the prompts of others in a step delay the next token of who decodes in it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from insitu.vocabulary import RequestClass, VerdictKind
from insitu_collector.requests.ledger import RequestLedger
from insitu_collector.requests.times import RequestTimes
from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.baseline import Expectation
from insitu_collector.steps.times import StepTimes
from insitu_collector.verdicts.finding import Finding

SHARE: Final = 0.1
"""Share of decoding requests' time that prompts added. The demo's ordinary load has 0.3 to 1.7 % (docs/verdicts.md)."""
MIN_RATIO: Final = 1.5
"""... and at least half the steps with prompts take so many times as long as those without: one that hangs is none."""
MIN_STEPS: Final = 10
"""Fewer steps with prompts than this in a window say nothing."""
CAP: Final = 3.0
"""A step's excess counts up to so many times their median: a hang or a pause in one of them is not the prompts'."""
CONTENDED_FACTOR: Final = 1.5
"""While others use the host the share must be so much higher."""
STILL_FACTOR: Final = 0.5
"""Once told it stands until the share is below this part of the threshold."""
ROUND: Final = 8
"""Rows; an advised budget is a multiple of it."""
AGREEMENT: Final = 2.0
"""A budget is advised if the fitted cost of the prompts seen is within this factor of what they took."""


Fits = Sequence[Expectation | None]
"""What each rank's steps should take."""


def is_possible(traffic: Mapping[int, StepTimes], t0_ns: int) -> bool:
    """Tell whether steps with prompts took enough of the decoding requests' time: what they added is less still."""
    mixed = total = 0.0
    for steps in traffic.values():
        recent = steps.only(steps.t_ns >= t0_ns)
        prefill = recent.shape[:, SHAPE.index("prefill_rows")]
        cost = recent.busy_ns * (recent.shape[:, SHAPE.index("num_rows")] - prefill)
        mixed, total = mixed + float(cost[prefill > 0].sum()), total + float(cost.sum())
    return mixed >= STILL_FACTOR * SHARE * max(total, 1.0)


def look(
    times: RequestTimes,
    ledger: RequestLedger,
    window: tuple[int, int],
    fits: Fits,
    *,
    contended: bool = False,
    already: bool = False,
) -> list[Finding]:
    """Return that prompts delay decoding. ledger: of the window, warm-up left out. fits: of every rank."""
    steps = times.mixed_steps(*window)
    if len(steps["ns"]) < MIN_STEPS:
        return []
    excess = np.maximum(steps["ns"] - steps["typical_ns"], 0.0)
    charged = float((np.minimum(excess, CAP * np.median(excess)) * steps["decoding"]).sum())
    decoding = ledger.spans["begin"] >= ledger.first_token_ns[ledger.spans["at"]]
    decoding &= ledger.first_token_ns[ledger.spans["at"]] >= 0
    share = charged / max(1, int(ledger.sums(decoding).sum()))
    slow = float(np.mean(steps["ns"] >= MIN_RATIO * steps["typical_ns"]))
    wanted = SHARE * (STILL_FACTOR if already else 1.0) * (CONTENDED_FACTOR if contended else 1.0)
    if share < wanted or slow < 0.5:
        return []
    delayed = np.unique(ledger.spans["at"][ledger.is_of(RequestClass.INTERFERENCE)])
    names = tuple(sorted(ledger.names[at] for at in delayed.tolist()))
    typical, mixed = float(np.median(steps["typical_ns"])), float(np.median(steps["ns"]))
    return [
        Finding(
            kind=VerdictKind.PREFILL_DELAYS_DECODE,
            confidence=slow,
            text=f"prompts delay decoding: a step that carries the prompts of others computes {mixed / 1e6:.1f} ms, "
            f"{mixed / max(typical, 1.0):.1f}x one that only decodes ({typical / 1e6:.1f} ms); that took "
            f"{100 * share:.0f} % of the time of requests past their first token, {len(names)} of them"
            f"{_gaps_text(times.token_gaps(), window)}.",
            remedy=_remedy(steps, budget(steps, fits)),
            t0_ns=window[0],
            t1_ns=window[1],
            requests=names,
            size=share,
        )
    ]


def _gaps_text(gaps: Columns, window: tuple[int, int]) -> str:
    inside = (gaps["t"] >= window[0]) & (gaps["t"] < window[1])
    alone, beside = gaps["ns"][inside & ~gaps["mixed"]], gaps["ns"][inside & gaps["mixed"]]
    if not len(alone) or not len(beside):
        return ""
    return (
        f"; the next token takes {np.median(alone) / 1e6:.0f} ms (median) without them and "
        f"{np.median(beside) / 1e6:.0f} ms with"
    )


def budget(steps: Columns, fits: Fits) -> int | None:
    """Return the most rows of a step with which one that carries prompts takes `MIN_RATIO` of one that does not.

    By the fitted cost of a prompt's rows; None where the fit does not describe the steps seen, or there is none.
    """
    rows = np.arange(1, int(steps["prefill"].max()) + 1)
    cost = np.zeros(len(rows))
    for fit in fits:
        if fit is None:
            return None
        coefficient = dict(zip(SHAPE, (fit.on_core.coefficients + fit.off_core.coefficients)[1:], strict=True))
        cost += (coefficient["num_rows"] + coefficient["prefill_rows"]) * rows
        cost += (
            coefficient["context"] * rows * (rows + 1) / 2 + coefficient["num_sampled"] + coefficient["num_requests"]
        )
    took, fitted = (steps["ns"] - steps["typical_ns"]).sum(), cost[steps["prefill"] - 1].sum()
    if not took / AGREEMENT <= fitted <= took * AGREEMENT:
        return None
    affordable = rows[cost <= (MIN_RATIO - 1.0) * np.median(steps["typical_ns"])].max(initial=0)
    most_decoding = int(steps["decoding"].max())
    found = (most_decoding + int(affordable)) // ROUND * ROUND
    return found if most_decoding < found < int((steps["prefill"] + steps["decoding"]).max()) else None


def _remedy(steps: Columns, advised: int | None) -> str:
    most = int((steps["prefill"] + steps["decoding"]).max())
    if advised is None:
        return f"Lower `--token-budget` below the {most} rows of the largest step: prompts then go in smaller parts."
    return (
        f"`--token-budget {advised}` (steps had up to {most} rows): by the fitted cost of a prompt's row a step with "
        f"prompts then takes at most {MIN_RATIO}x one without, and a prompt more steps. It must exceed `--max-batch`."
    )
