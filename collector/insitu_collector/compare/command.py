"""`insitu compare A B`: run against run, rank against rank, before and after a moment."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from insitu.cli import ExitCode
from insitu_collector.compare.comparison import Comparison, Measured, Ratio, compare
from insitu_collector.compare.fail_on import FORMS, Condition, Outcome, outcome, parse_condition
from insitu_collector.compare.sides import NothingToCompare, Recorded
from insitu_collector.opening import opened

SCHEMA: Final = "insitu.compare/1"
_FIGURES: Final = {
    "tokens_per_s": ("tokens/s", 1.0),
    "ttft_p50_s": ("first token p50, ms", 1e3),
    "ttft_p95_s": ("first token p95, ms", 1e3),
    "itl_p50_s": ("between tokens p50, ms", 1e3),
    "itl_p99_s": ("between tokens p99, ms", 1e3),
}
_SITE_FIGURES: Final = {
    "row_sum": "mean row sum",
    "absmax": "log2 of the largest magnitude",
    "nonfinite": "steps not finite",
}


def _conditions(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[Condition, ...]:
    try:
        return tuple(parse_condition(text) for text in texts)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _two_ranks(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, comma, second = text.partition(",")
    if not (comma and first.isdecimal() and second.isdecimal()):
        raise click.BadParameter(f"{text!r} is not two ranks like 0,1")
    return int(first), int(second)


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path), required=False)
@click.option("--run-a", default="", help="A's run, by how its name begins.  [default: the one that began last]")
@click.option("--run-b", default="", help="B's run; with it B may be left out: another run of the same store.")
@click.option("--replica-a", type=click.IntRange(0), metavar="N", help="Of A's run this replica.  [default: its first]")
@click.option(
    "--replica-b", type=click.IntRange(0), metavar="N", help="Of B's run; with it B may be left out: of A's run."
)
@click.option("--ranks", callback=_two_ranks, metavar="I,J", help="Rank I of A against rank J of B (of A without B).")
@click.option("--at", type=float, metavar="SECONDS", help="A's traffic before this moment against the rest of it.")
@click.option(
    "--fail-on", multiple=True, callback=_conditions, metavar="CONDITION", help=f"Exit with 3 if so: {FORMS}."
)
@click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA}).")
@click.pass_context
def command(
    ctx: click.Context,
    a: Path,
    b: Path | None,
    run_a: str,
    run_b: str,
    replica_a: int | None,
    replica_b: int | None,
    ranks: tuple[int, int] | None,
    at: float | None,
    fail_on: tuple[Condition, ...],
    as_json: bool,
) -> None:
    """Say how B differs from A: step times at equal batch shape, latencies, values at sites, verdicts.

    A and B are folders, or grpc://HOST:PORT of collectors (docs/query.md).

    Exit code 3: something that --fail-on names is so; 5: too little was recorded to tell.

    \b
    insitu compare ./insitu-store ./insitu-store --fail-on verdicts
    insitu compare ./insitu-store ./insitu-store --json
    """
    _check_use(b, run_b, replica_b, ranks, at)
    try:
        first = _recorded(a, run_a, replica_a)
        is_other = b is not None or run_b or replica_b is not None
        run = run_b or ("" if b is not None else first.run)
        found = _found(first, _recorded(b or a, run, replica_b) if is_other else first, ranks, at)
    except NothingToCompare as error:
        raise click.ClickException(str(error)) from None
    outcomes = {condition: outcome(condition, found) for condition in fail_on}
    click.echo(json.dumps(to_json(found, outcomes), indent=1) if as_json else to_text(found, outcomes))
    if Outcome.FAILED in outcomes.values():
        ctx.exit(ExitCode.PROBLEMS_FOUND)
    if Outcome.UNDECIDED in outcomes.values():
        ctx.exit(ExitCode.PARTIAL)


def _check_use(
    b: Path | None, run_b: str, replica_b: int | None, ranks: tuple[int, int] | None, at: float | None
) -> None:
    is_other = b is not None or bool(run_b) or replica_b is not None
    if at is not None and (is_other or ranks is not None):
        raise click.UsageError("--at compares A with itself; leave B, --run-b, --replica-b and --ranks out")
    if not is_other and ranks is None and at is None:
        raise click.UsageError(
            "what is A compared with? Give B, --run-b HEX, --replica-b N, --ranks I,J or --at SECONDS"
        )


def _recorded(store: Path, run: str, replica: int | None) -> Recorded:
    with opened(store) as read:
        return Recorded(read, run, replica)


def _found(a: Recorded, b: Recorded, ranks: tuple[int, int] | None, at: float | None) -> Comparison:
    if at is not None:
        return compare(*a.split(at))
    if ranks is None:
        sides = a.whole(), b.whole()
        return compare(*sides, pairs=_beside(*sides) if a.run == b.run else None)
    sides = a.rank(ranks[0]), b.rank(ranks[1])
    return compare(*sides, pairs={ranks[0]: ranks[1]})


def _beside(a: Measured, b: Measured) -> dict[int, int] | None:
    """Return rank of A -> rank of B in the same place, whatever their numbers; None where the grids differ."""
    places = [sorted(side.stages, key=lambda rank: (side.stages[rank], rank)) for side in (a, b)]
    stages = [[side.stages[rank] for rank in ranks] for side, ranks in zip((a, b), places, strict=True)]
    return dict(zip(*places, strict=True)) if stages[0] == stages[1] else None


def to_json(found: Comparison, outcomes: dict[Condition, Outcome]) -> dict[str, Any]:
    """Return the document `insitu.compare/1`. An infinite shift (no spread at all) is null."""
    return {
        "schema": SCHEMA,
        "a": found.a,
        "b": found.b,
        "steps": [asdict(change) for change in found.steps],
        "figures": [asdict(figure) for figure in found.figures],
        "sites": [
            {
                "site": change.site,
                "figure": change.figure,
                "a": change.a,
                "b": change.b,
                "deviations": _finite(change.shift.size),
                "errors": _finite(change.shift.errors),
            }
            for change in found.sites
        ],
        "num_sites": found.num_sites,
        "verdicts_gained": [dict(zip(("kind", "stage", "rank"), alarm, strict=True)) for alarm in found.gained],
        "verdicts_lost": [dict(zip(("kind", "stage", "rank"), alarm, strict=True)) for alarm in found.lost],
        "doubts": list(found.doubts),
        "fail_on": {str(condition): str(result) for condition, result in outcomes.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def to_text(found: Comparison, outcomes: dict[Condition, Outcome]) -> str:
    """Return the same for people."""
    lines = [f"A  {found.a}", f"B  {found.b}", ""]
    lines += ["A step, busy (compute, host, sample); the ratio is at equal batch shape, with its 95 % interval:", ""]
    lines.append(
        f"  {'stage':>5} {'rank':>7} {'A, ms':>8} {'B, ms':>8}  {'B / A':<22} {'on the core':<22} off the core"
    )
    for step in found.steps:
        rank = str(step.rank_a) if step.rank_a == step.rank_b else f"{step.rank_a} -> {step.rank_b}"
        off = f"{100 * step.off_share_a:.0f} % -> {100 * step.off_share_b:.0f} %"
        ratios = f"{_ratio(step.ratio):<22} {_ratio(step.core_ratio):<22}"
        lines.append(f"  {step.stage:>5} {rank:>7} {step.a_ms:>8.2f} {step.b_ms:>8.2f}  {ratios} {off}")
    known = [figure for figure in found.figures if figure.a is not None or figure.b is not None]
    if known:
        lines += ["", f"  {'of requests':<24} {'A':>8} {'B':>8}  B / A"]
    for figure in known:
        label, factor = _FIGURES[figure.name]
        a, b = ("-" if value is None else f"{value * factor:.1f}" for value in (figure.a, figure.b))
        lines.append(f"  {label:<24} {a:>8} {b:>8}  {_ratio(figure.ratio) if figure.ratio else ''}".rstrip())
    lines += ["", *_site_lines(found), "", *_verdict_lines(found)]
    lines += [f"Not compared: {doubt}." for doubt in found.doubts]
    lines += [f"--fail-on {condition}: {result}" for condition, result in outcomes.items()]
    return "\n".join(lines)


def _ratio(ratio: Ratio | None) -> str:
    return "too little to tell" if ratio is None else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _site_lines(found: Comparison) -> list[str]:
    if not found.num_sites:
        return ["Values: no site was recorded by both."]
    if not found.sites:
        return [f"Values: none of {found.num_sites} sites that both recorded moved."]
    lines = [f"Values: {len({change.site for change in found.sites})} of {found.num_sites} sites moved:"]
    for change in found.sites:
        how = f"{change.shift.size:+.2f} deviations" if math.isfinite(change.shift.size) else "and neither varies"
        if change.figure == "nonfinite":
            how = "steps"
        lines.append(f"  {change.site:<20} {_SITE_FIGURES[change.figure]}: {change.a:.4g} -> {change.b:.4g}, {how}")
    return lines


def _verdict_lines(found: Comparison) -> list[str]:
    def told(alarms: tuple[tuple[str, int | None, int | None], ...]) -> str:
        return ", ".join(kind if rank is None else f"{kind} on rank {rank}" for kind, _, rank in alarms) or "none"

    return [f"Verdicts that B has and A has not: {told(found.gained)}; that A alone has: {told(found.lost)}."]
