"""What a person in a notebook asks of a store; `Store` has each of these as a method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.plugins.discovery import STATISTICS, named
from insitu.statistic_plugins import measure_of
from insitu.vocabulary import VerdictKind
from insitu_collector.judge.runs import final_verdicts
from insitu_collector.ledger.window import rank_stages
from insitu_collector.ledger.words import heading
from insitu_collector.query.asked import Time
from insitu_collector.rows.selection import NothingFound, Selection, as_time, chosen_replica, select, time_of
from insitu_collector.values.divergence import divergence as divergence_of
from insitu_collector.values.expert_balance import expert_balance
from insitu_collector.values.plugged import plugged_values
from insitu_collector.values.statistics import value_statistics
from insitu_collector.verdicts.finding import Verdict
from insitu_collector.views.spans import lanes_of, spans_of
from insitu_collector.views.stalls import Stalls, stalls_of, traffic_window

if TYPE_CHECKING:
    import altair as alt

    from insitu_collector.store import Store

DEFAULT_NS: Final = 500_000_000
"""Of a timeline for which no step and no window is asked: a few dozen steps, each to be seen."""
QUIET: Final = (VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE)
AROUND: Final = 0.15
"""Of a step's time, on either side of it, what its timeline shows too."""


def stalls(store: Store, run: str = "", replica: int | None = None) -> Stalls:
    """Return verdicts and ledger; in a notebook it shows as a card.

    replica: of this one alone; None: of the first, with the others as its `siblings`. Raises NothingFound without such.
    """
    found = stalls_of(store, run, replica=replica)
    if found is None:
        select(store, run)  # says what there is instead
        raise NothingFound(f"the store {store.name} holds no record of any rank")
    return found


def verdicts(store: Store, run: str = "") -> list[Verdict]:
    """Return what stands, most severe first; a store that was never judged is judged here."""
    return final_verdicts(store, select(store, run).run)


def statistics(
    store: Store, t0: Time | None = None, t1: Time | None = None, run: str = "", *, by_step: bool = False
) -> pa.Table:
    """Return what the values at each site were like in the sampled steps that began in [t0, t1): docs/probe.md.

    One row a site, or with `by_step` a site and step. Raises NothingFound where no statistics were taken.
    """
    chosen = select(store, run, _unix(t0), _unix(t1))
    rows = chosen.rows("statistics")
    if not rows.num_rows:
        asked = 'insitu.attach(model, rules=[insitu.Rule(sites="*", take="summary")])'
        raise NothingFound(f"run {chosen.run} has no statistics there; they are taken where a rule asks: {asked}")
    return value_statistics(rows, chosen.rows("sites"), by_step=by_step, sampling=chosen.rows("sampling"))


def plugin_statistics(
    store: Store, name: str, t0: Time | None = None, t1: Time | None = None, run: str = "", *, by_step: bool = False
) -> pa.Table:
    """Return what a statistic of another package tells of the sampled steps that began in [t0, t1).

    One row a site, or with `by_step` a site and step. Raises NothingFound where none were taken, and PluginError where
    the package is not installed here.
    """
    measure = measure_of(name, named(STATISTICS, name))
    chosen = select(store, run, _unix(t0), _unix(t1))
    rows = chosen.rows("plugin_statistics")
    rows = rows.filter(pc.equal(rows["statistic"], name))
    if not rows.num_rows:
        asked = f'insitu.attach(model, rules=[insitu.Rule(sites="*", take="{name}")])'
        raise NothingFound(f"run {chosen.run} has no {name} there; it is taken where a rule asks: {asked}")
    return plugged_values(rows, chosen.rows("sites"), measure, by_step=by_step)


def experts(store: Store, t0: Time | None = None, t1: Time | None = None, run: str = "") -> pa.Table:
    """Return how evenly each router spread its choices in the sampled steps that began in [t0, t1): docs/probe.md.

    Raises NothingFound where no router told of any.
    """
    chosen = select(store, run, _unix(t0), _unix(t1))
    rows = chosen.rows("expert_loads")
    if not rows.num_rows:
        raise NothingFound(f"run {chosen.run} has no loads of experts there; models without routers have none")
    return expert_balance(rows, chosen.rows("sites"))


def divergence(store: Store, t0: Time | None = None, t1: Time | None = None, run: str = "") -> pa.Table:
    """Return whether ranks that hold a site whole held the same bits in the sampled steps that began in [t0, t1).

    Raises NothingFound where no two ranks told of one site in one step.
    """
    chosen = select(store, run, _unix(t0), _unix(t1))
    found = divergence_of(chosen.rows("statistics"), chosen.rows("sites"), chosen.sources)
    if not found.num_rows:
        raise NothingFound(
            f"run {chosen.run} has no step there of which two ranks hold one site whole and took its statistics"
        )
    return found


def timeline(
    store: Store,
    step: int | None = None,
    window: tuple[Time, Time] | None = None,
    run: str = "",
    replica: int | None = None,
) -> alt.LayerChart:
    """Return what each rank did around a step, or in a window, or in the half second in which most steps began.

    That half second is of what the first verdict speaks of, or else of all traffic. replica: whose ranks; None: those
    of the first.

    Raises NothingFound when nothing was recorded there.
    """
    with _needing("notebook"):
        from insitu_collector.views import charts
    if step is not None and window is not None:
        raise ValueError("a timeline is of a step or of a window, not of both")
    whole = select(store, run)
    replica = chosen_replica(whole.run, whole.replicas, replica)
    chosen = _around(whole, replica, step, window)
    epochs = whole.epochs(replica)
    rows = _of(chosen.rows("intervals"), epochs)
    if not rows.num_rows:
        raise NothingFound(f"run {chosen.run} has no intervals there")
    stages = rank_stages(_of(chosen.sources, epochs), rows)
    lanes = {rank: stages[rank] for rank in lanes_of(stages)}
    t0, t1 = chosen.line_window()
    long = f"{(t1 - t0) / 1e6:.0f} ms"
    begin = chosen.clock.unix_ns(t0)
    of = f"{long} from {as_time(begin)}"
    if step is not None:
        of = f"{long} around step {step}; other steps are faded"
    spans = spans_of(rows, chosen.clock, stages)
    return charts.timeline_chart(spans, lanes, (t0, t1), begin, _title(_verdicts(chosen, replica), of), step)


def ledger_chart(store: Store, run: str = "", replica: int | None = None) -> alt.LayerChart:
    """Return where each rank's time went, in percent of the time from the first step to the last.

    replica: of which; None: of the first. Raises NothingFound without traffic, or without such a replica.
    """
    with _needing("notebook"):
        from insitu_collector.views import charts
    found = stalls(store, run, replica)
    if found.ledger is None:
        raise NothingFound(f"run {found.run} has no steps with traffic, so no ledger")
    return charts.ledger_bars(found.ledger, _title(found.verdicts, heading(found.ledger)))


def latency_chart(store: Store, run: str = "") -> alt.VConcatChart:
    """Return what requests felt over time. Raises NothingFound where no token was recorded."""
    from insitu_collector.requests.latency import timed_samples

    with _needing("notebook"):
        from insitu_collector.views import charts
    chosen = select(store, run)
    first, between, num_tokens = timed_samples(chosen.rows("requests"), chosen.clock)
    times = np.concatenate([first.t_ns, between.t_ns])
    if not len(times):
        what = "no tokens of requests" if not num_tokens else "tokens, but of no request whose begin it knows"
        raise NothingFound(f"run {chosen.run} has {what}, so no latencies; the driver of an engine records them")
    begin = int(times.min())
    told = final_verdicts(store, chosen.run)
    title = _title(told, f"What requests of run {chosen.run} felt; grey: the windows of verdicts")
    samples = {"first": first, "between": between}
    return charts.latency_lines(samples, begin, chosen.clock.unix_ns(begin), told, title)


def perfetto(
    store: Store, path: str | Path, window: tuple[Time, Time] | None = None, run: str = "", *, force: bool = False
) -> Path:
    """Write a Perfetto trace and return its path. Raises as `insitu_collector.export.command.export_trace` does."""
    from insitu_collector.export.command import export_trace

    begin, end = (None, None) if window is None else (_unix(window[0]), _unix(window[1]))
    with _needing("perfetto"):
        return export_trace(select(store, run, begin, end), "perfetto", Path(path), force=force).out


def _around(whole: Selection, replica: int, step: int | None, window: tuple[Time, Time] | None) -> Selection:
    if window is not None:
        return select(whole.store, whole.run, _unix(window[0]), _unix(window[1]))
    begin, end = _busiest(whole, replica) if step is None else _of_step(whole, replica, step)
    return select(whole.store, whole.run, whole.clock.unix_ns(begin), whole.clock.unix_ns(end))


def _busiest(whole: Selection, replica: int) -> tuple[int, int]:
    """Return the half second in which most steps began: of what the first verdict speaks of, else of all traffic."""
    epochs = whole.epochs(replica)
    of_ranks = {name: _of(whole.rows(name), epochs) for name in ("steps", "intervals")}
    found = traffic_window({"sources": whole.sources, "events": whole.rows("events"), **of_ranks})
    if found is None:
        raise NothingFound(f"run {whole.run} has no steps with traffic; name a window")
    begun = np.unique(whole.clock.moved(of_ranks["steps"], "t0_ns"))
    begun = begun[(begun >= found[0]) & (begun < found[1])]
    told = [verdict for verdict in _verdicts(whole, replica) if verdict.kind not in QUIET][:1]
    for verdict in told:
        t0, t1 = (
            t - whole.clock.unix_minus_mono_ns for t in (verdict.window_start_unix_ns, verdict.window_end_unix_ns)
        )
        inside = begun[(begun >= t0) & (begun < t1)]
        begun = inside if len(inside) else begun
    counts = np.searchsorted(begun, begun + DEFAULT_NS) - np.arange(len(begun))
    begin = int(begun[int(counts.argmax())])
    return begin, min(begin + DEFAULT_NS, found[1])


def _of_step(whole: Selection, replica: int, step: int) -> tuple[int, int]:
    epochs = whole.epochs(replica)
    times: list[int] = []
    for batch in whole.scan("intervals"):
        mine = batch.filter(pc.and_(pc.equal(batch["step_id"], step), pc.is_in(batch["epoch"], epochs)))
        if mine.num_rows:
            times += [int(whole.clock.moved(mine, "t0_ns").min()), int(whole.clock.moved(mine, "t1_ns").max())]
    if not times:
        raise NothingFound(f"run {whole.run} has no intervals of step {step}")
    around = int(AROUND * (max(times) - min(times))) + 1
    return min(times) - around, max(times) + around


def _of(rows: pa.Table, epochs: pa.Array) -> pa.Table:
    return rows.filter(pc.is_in(rows["epoch"], epochs))


def _verdicts(chosen: Selection, replica: int) -> list[Verdict]:
    return [verdict for verdict in chosen.verdicts() if verdict.replica == replica]


def _title(told: list[Verdict], what: str) -> tuple[str, str]:
    """Return the first verdict in a few words, and the rest with what is shown; without one, what is shown."""
    if not told:
        return what, ""
    head, colon, rest = told[0].text.partition(": ")
    if not colon:
        head, _, rest = told[0].text.partition(". ")
    return head, f"{rest} {what}.".strip()


def _unix(time: Time | None) -> int | None:
    return time_of(time) if isinstance(time, str) else time


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise _without(error, extra) from None


def _without(error: ModuleNotFoundError, extra: str) -> ModuleNotFoundError:
    package = (error.name or "").partition(".")[0]
    if package.startswith("insitu") or not package:
        return error
    line = f"this needs the package {package}, which is not installed: pip install 'insitu[{extra}]'"
    return ModuleNotFoundError(line, name=package)
