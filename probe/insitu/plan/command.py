"""`insitu plan`: what rules would take of a model and cost, before anything is switched on; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from insitu.config import Origin
from insitu.config_show import load_for_command
from insitu.plan.estimate import GIB_AN_HOUR, PHASES, Line, Traffic, always_bytes, forms_of, lines_of, per_s
from insitu.rules.options import BadRules, read_axes, read_rules, rule_options
from insitu.rules.rule import ROWS, SUMMARY, Rule, check_fit
from insitu.rules.text import rule_text
from insitu.sites.command import meta_model

if TYPE_CHECKING:
    from insitu.config import Config
    from insitu.row_forms import RowForm
    from insitu.sites.catalogue import Catalogue
    from insitu.sites.site import Site

SCHEMA: Final = "insitu.plan/1"


@dataclass(frozen=True, slots=True)
class Found:
    """What a plan is made of."""

    model: str
    cls: str
    sites: tuple[Site, ...]
    """Those that are tapped."""
    num_sites: int
    shapes: Mapping[int, tuple[int, str]]
    traffic: Traffic
    lines: tuple[Line, ...]
    max_rows: int
    silent: frozenset[int] = frozenset()
    """Sites that take nothing in a quiet step (the setting `t0`)."""
    budget: float = 1.0
    """Share of step time that the probe may take (the setting `overhead_budget`)."""


def look(model: str, rules: Sequence[Rule], traffic: Traffic, config: Config) -> Found:
    """Return what the rules mean in a model. Raises BadRules or ClickException, one line."""
    from insitu.plan.shapes import shapes_of
    from insitu.sites.canaries import tapped, without_canary
    from insitu.sites.catalogue import catalogue

    built = meta_model(model)
    found = catalogue(built, config.axes)
    _check_axes(config, found)
    try:
        check_fit(rules, config.max_rows)
        sites = tapped(found.plan([rule.sites for rule in rules]), rules, config.t0)
    except ValueError as error:  # a rule that means nothing here, or asks for too much
        raise BadRules(str(error)) from None
    shapes = shapes_of(built, sites)
    lines = tuple(lines_of(rules, sites, shapes, traffic))
    return Found(
        model,
        type(built).__name__,
        sites,
        len(found.sites),
        shapes,
        traffic,
        lines,
        config.max_rows,
        without_canary(sites, config.t0),
        config.overhead_budget,
    )


def _check_axes(config: Config, found: Catalogue) -> None:
    """Raise BadRules for an `--axis` that means no site; of a file, which is read for all models, say it."""
    for error in found.not_axes(config.axes):
        if config.origin("axes") is Origin.ARGUMENT:
            raise BadRules(f"--axis: {error}")
        click.echo(f"insitu: axes in {config.file}: {error}", err=True)


def memory_of(found: Found) -> dict[str, int]:
    """Return the bytes that slabs take, by what they are for; `row_slabs` is how many there are for rows."""
    from insitu.slabs.rows import num_slabs_of, slab_bytes_of
    from insitu.slabs.slab import Plan
    from insitu.slabs.statistics import NUM_SLABS
    from insitu.statistics import layout
    from insitu.statistics.staging import buffer_bytes
    from insitu.statistics.workspace import ELEMENT_BYTES, HOST_BLOCK

    plan = Plan(found.sites, tuple(line.rule for line in found.lines), found.max_rows)
    forms: dict[int, RowForm] = {}
    for line in found.lines:
        if line.rule.take == ROWS:
            forms |= forms_of(line.rule, line.sites, found.shapes)
    num_row_slabs = num_slabs_of(forms, found.max_rows) if forms else 0
    measured = [s for line in found.lines if line.rule.take == SUMMARY for s in line.sites if s.shard != "partial"]
    widths = [(found.shapes[s.number][0], s.is_residual) for s in measured if s.number in found.shapes]
    computed = ELEMENT_BYTES * max([HOST_BLOCK, *(width for width, _ in widths)]) + buffer_bytes(widths, HOST_BLOCK)
    places = NUM_SLABS * len(measured) * 8 * (layout.NUM_INTS + layout.NUM_FLOATS)
    sizes = {
        "steps": plan.num_slabs * plan.slab_bytes,
        "rows": num_row_slabs * slab_bytes_of(forms, found.max_rows),
        "statistics": places + computed if measured else 0,
    }
    return {**sizes, "together": sum(sizes.values()), "row_slabs": num_row_slabs}


def document(found: Found) -> dict[str, Any]:
    """Return what `--json` prints."""
    traffic, lines = found.traffic, found.lines
    always = always_bytes(sum(site.boundary for site in found.sites), traffic)
    total = per_s(always, traffic) + sum(line.bytes_per_s for line in lines)
    memory, share = memory_of(found), shares_of(found)
    return {
        "schema": SCHEMA,
        "model": found.model,
        "class": found.cls,
        "num_sites": found.num_sites,
        "num_tapped": len(found.sites),
        "assumed": {**asdict(traffic), "max_rows": found.max_rows, "steps_per_s": traffic.steps_per_s},
        "always": {"step_bytes": always, "bytes_per_s": per_s(always, traffic)},
        "rules": [_entry(line) for line in lines],
        "bytes_per_s": total,
        "gib_an_hour": total * GIB_AN_HOUR,
        "memory_bytes": memory,
        "step_time_share": share,
        "notes": [*_notes(lines), *_memory_notes(memory), *_budget_notes(found, share)],
    }


def shares_of(found: Found) -> dict[str, Any]:
    """Return the probe's share of step time, by phase; `always` without what rules add; and how that was made out."""
    from insitu.plan.costs import HOW, Costs

    costs = Costs(found.traffic, dict(found.shapes))
    sites = [site for site in found.sites if site.number not in found.silent]
    return {
        **{phase: costs.share(phase, sites, found.lines) for phase in PHASES},
        "always": {phase: costs.share(phase, sites) for phase in PHASES},
        "budget": found.budget,
        "how": HOW,
    }


def _budget_notes(found: Found, share: Mapping[str, Any]) -> list[str]:
    """Say what the governor would do, by the estimate."""
    always, asked = (_of_all_time(found.traffic, each) for each in (share["always"], share))
    if always > found.budget:
        return [f"what every step pays would be over overhead_budget={found.budget:g}, with and without these rules"]
    if asked > found.budget:
        return [
            f"what rules add would be over overhead_budget={found.budget:g}: summaries, and rows that nobody asks for "
            "by name, will be taken in fewer steps than they say"
        ]
    return []


def _of_all_time(traffic: Traffic, share: Mapping[str, Any]) -> float:
    step_s = {"decode": traffic.decode_ms / 1e3, "prefill": traffic.prefill_ms / 1e3}
    return sum(float(share[phase]) * traffic.steps_per_s[phase] * step_s[phase] for phase in PHASES)


def _entry(line: Line) -> dict[str, Any]:
    return {
        "rule": rule_text(line.rule),
        "sites": [site.name for site in line.sites],
        "num_named": line.num_named,
        "step_bytes": line.step_bytes,
        "bytes_per_s": line.bytes_per_s,
        "asked_bytes_per_s": line.asked_bytes_per_s,
        "gib_an_hour": line.bytes_per_s * GIB_AN_HOUR,
        "unknown_width": list(line.unknown),
    }


def _notes(lines: Sequence[Line]) -> list[str]:
    notes = []
    for number, line in enumerate(lines, 1):
        if not line.sites:
            notes.append(f"rule {number} takes nothing: earlier rules of its kind name all its sites")
        elif len(line.sites) < line.num_named:
            notes.append(
                f"rule {number} is followed at {len(line.sites)} of the {line.num_named} sites it names: "
                "earlier rules of its kind name the others"
            )
        if line.rule.take not in (ROWS, SUMMARY):
            notes.append(f"rule {number}: what a statistic of another package takes is not known, and not counted")
        if line.unknown:
            notes.append(
                f"rule {number}: how wide the rows of {', '.join(line.unknown[:3])} are is not known, of "
                f"{len(line.unknown)} sites in all; they are not counted"
            )
        if line.is_bounded:
            notes.append(
                f"rule {number} asks for {size_text(line.asked_bytes_per_s)}/s, and max_bytes_per_s leaves out what is "
                f"beyond {size_text(line.bytes_per_s)}/s"
            )
    return notes


def _memory_notes(memory: Mapping[str, int]) -> list[str]:
    from insitu.slabs.rows import ROW_BUDGET_BYTES

    if memory["rows"] <= ROW_BUDGET_BYTES:
        return []
    return [
        f"the rows of two steps take {size_text(memory['rows'])}, more than the {size_text(ROW_BUDGET_BYTES)} they "
        "should: lower max_rows, name fewer sites, or use cast= or topk="
    ]


def size_text(num_bytes: float) -> str:
    """Return a size as a person reads it."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"


def table(found: dict[str, Any]) -> str:
    """Return the document as a person reads it."""
    rows: list[Sequence[str]] = [("taken", "sites", "decode step", "prefill step", "GiB an hour")]
    always, assumed = found["always"], found["assumed"]
    rows.append(_cells("always", found["num_tapped"], always["step_bytes"], always["bytes_per_s"]))
    rows += [
        _cells(line["rule"], len(line["sites"]), line["step_bytes"], line["bytes_per_s"]) for line in found["rules"]
    ]
    rows.append(("together", "", "", "", f"{found['gib_an_hour']:.3g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    memory, share = found["memory_bytes"], found["step_time_share"]
    lines = [
        f"{found['class']}: {found['num_tapped']} of {found['num_sites']} sites tapped. An estimate of one rank, at",
        f"  {assumed['batch']} requests in a decode step of {assumed['decode_ms']:g} ms, {assumed['prompt']} rows in a "
        f"prefill step of {assumed['prefill_ms']:g} ms, {assumed['prefill_share']:.0%} of steps prefill, "
        f"{assumed['opted_in']:.0%} of requests opting in",
        *("  ".join(_aligned(row, widths)).rstrip() for row in rows),
        f"memory: {size_text(memory['together'])} of slabs (steps {size_text(memory['steps'])}, rows "
        f"{size_text(memory['rows'])}, statistics {size_text(memory['statistics'])})",
        f"step time: about {share['decode']:.1%} of a decode step, {share['prefill']:.1%} of a prefill step",
        f"  {share['how']}",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


def _cells(name: str, num_sites: int, step_bytes: Mapping[str, float], bytes_per_s: float) -> tuple[str, ...]:
    sizes = (size_text(step_bytes[phase]) for phase in PHASES)
    return name, str(num_sites), *sizes, f"{bytes_per_s * GIB_AN_HOUR:.3g}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


_USUAL: Final = Traffic()
_POSITIVE: Final = click.FloatRange(min=0, min_open=True)
_SHARE: Final = click.FloatRange(0, 1)


@click.command()
@click.argument("model", metavar="MODEL_DIR")
@rule_options
@click.option("--batch", default=_USUAL.batch, show_default=True, type=click.IntRange(1), help="Requests a step.")
@click.option(
    "--prompt", default=_USUAL.prompt, show_default=True, type=click.IntRange(1), help="Rows of a prefill step."
)
@click.option("--decode-ms", default=_USUAL.decode_ms, show_default=True, type=_POSITIVE, help="Of a decode step.")
@click.option("--prefill-ms", default=_USUAL.prefill_ms, show_default=True, type=_POSITIVE, help="Of a prefill step.")
@click.option("--prefill-share", default=_USUAL.prefill_share, show_default=True, type=_SHARE, help="Of steps.")
@click.option("--opted-in", default=_USUAL.opted_in, show_default=True, type=_SHARE, help="Share of requests.")
@click.option("--axis", "axes", metavar="SITES=AXIS", multiple=True, help="Rows are tokens, samples or batch.")
@click.option("--max-rows", metavar="N", help="Most rows of a step that are kept; as attach has it.")
@click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA}).")
def plan(
    model: str,
    file: str | None,
    texts: tuple[str, ...],
    axes: tuple[str, ...],
    max_rows: str | None,
    as_json: bool,
    **traffic: Any,
) -> None:
    """Print what rules would take of a model and what it would cost, before anything is switched on.

    MODEL_DIR is a folder with config.json, or a model type of transformers; no weight is read. The figures are of one
    rank that holds the whole model and always has work, and follow from the traffic that the options state.

    \b
    insitu plan gpt2 --rule 'L*.resid_post,requests=all,rows=last,cast=bf16'
    insitu plan gpt2 --rule '*,take=summary,every=64' --rule 'logits,topk=64,max_bytes_per_s=1MiB'
    insitu plan llama --batch 32 --decode-ms 40 --axis logits=samples --json | python -m json.tool
    """
    rules = read_rules(file, texts)
    config = load_for_command(max_rows=max_rows, axes=read_axes(axes) or None)
    found = document(look(model, rules, Traffic(**traffic), config))
    click.echo(json.dumps(found, indent=1) if as_json else table(found))
