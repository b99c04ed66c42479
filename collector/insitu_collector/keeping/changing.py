"""`insitu store repair`, `compact` and `expire`: commands that change files, and no row that anybody may still read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from insitu.cli import ExitCode
from insitu.config_show import load_for_command
from insitu.segments.erased_file import ErasedFile
from insitu_collector.keeping import repairing
from insitu_collector.keeping.expiring import expire as expire_in
from insitu_collector.keeping.letters import erase_letters
from insitu_collector.keeping.merge_plan import ON_DEMAND
from insitu_collector.keeping.passes import Clean, erase_shard, merge_shard, note_unreadable, write_twins
from insitu_collector.keeping.recorder import Recorder
from insitu_collector.keeping.rewriting import Rewritten
from insitu_collector.keeping.shards import shards_of
from insitu_collector.keeping.twins import missing_twins, sweep_twins
from insitu_collector.keeping.words import DRY_RUN, STORE, json_option, opened, refresh_catalog, say


@click.command("repair")
@STORE
@DRY_RUN
@json_option("repair")
@click.pass_context
def repair(ctx: click.Context, store: Path, dry_run: bool, as_json: bool) -> None:
    """Make STORE whole: recover what dead writers left, keep what is whole of damaged segments, make the rest anew.

    Damaged originals go to quarantine; what is lost is counted in `gaps`. Shards that are being written are left to
    their writers.

    \b
    insitu store repair ./insitu-store --dry-run
    insitu store repair ./insitu-store --json

    Exit codes: 0 done, 5 something stays as it is: damaged while it is being written, or of a newer format.
    """
    with opened(store) as path:
        if dry_run:
            done = repairing.plan(path)
        else:
            with Recorder(path) as recorder:
                done = repairing.repair(path, recorder)
    document = {
        "dry_run": dry_run,
        "recovered": [name.file for name in done.recovered],
        "salvaged": [name.file for name in done.salvaged],
        "kept_twins": [name.file for name in done.kept_twins],
        "twins": [name.file for name in done.twins],
        "catalog": done.catalog,
        "in_use": done.in_use,
        "left": [file for file, _ in done.left],
        "newer": [name.file for name in done.newer],
    }
    verb = "would be " if dry_run else ""
    lines = [f"{name}: {verb}sealed, as far as it is whole" for name in done.recovered]
    lines += [
        f"{name}: {verb}made anew from what is whole; the original {verb}kept in quarantine" for name in done.salvaged
    ]
    lines += [f"twins/{name}: {verb}kept in quarantine beside the original" for name in done.kept_twins]
    lines += [f"twins/{name}: {verb}made anew" for name in done.twins]
    lines += [f"the catalog: {verb}made anew"] if done.catalog else []
    lines += [f"{name}: left as it is, of a newer format" for name in done.newer]
    lines += [
        f"{file}: damaged, left to the writer of its shard; run this again once nobody writes {shard}"
        for file, shard in done.left
    ]
    lines += [f"shard {shard}: left to its writer" for shard in done.in_use]
    say("repair", store, document, lines or ["nothing to repair"], as_json)
    if done.newer or done.left:
        ctx.exit(ExitCode.PARTIAL)


@click.command("compact")
@STORE
@json_option("compact")
@click.pass_context
def compact(ctx: click.Context, store: Path, as_json: bool) -> None:
    """Merge small segments of STORE, take out what is erased, write Parquet twins and the catalog.

    Shards that are being written are left to their writers: a collector does the same by itself.

    \b
    insitu store compact ./insitu-store
    insitu store compact ./insitu-store --json

    Exit codes: 0 done, 3 damaged segments were left as they are, 5 some of a newer format were.
    """
    result, in_use = Rewritten(), []
    with opened(store) as path, Recorder(path) as recorder:
        erased, clean = ErasedFile(path).read(), Clean()
        erase_letters(path, erased)
        for shard in shards_of(path):
            with recorder.hold(shard) as held:
                if held is None:
                    in_use.append(shard)
                else:
                    erase_shard(path, held, erased, recorder.tell, clean, result)
                    merge_shard(path, held, ON_DEMAND, result)
        twins = write_twins(path, missing_twins(path), erased)
        sweep_twins(path)
        note_unreadable(path, result)
        refresh_catalog(path)
    document = _rewritten(result) | {"twins": [name.file for name in twins], "in_use": in_use}
    num_inputs = sum(len(inputs) for inputs in result.made.values())
    merged = f"{num_inputs} segments are {len(result.made)} now" if result.made else "nothing to merge"
    lines = [f"{merged}; {len(twins)} twins written"]
    lines += [f"{name}: damaged, left as it is: {text}" for name, text in result.damaged.items()]
    if result.damaged:
        lines.append(f"{len(result.damaged)} damaged segments were left: insitu store repair {store}")
    lines += [f"{name}: of a newer format, left as it is" for name in result.newer]
    lines += ["the disk is nearly full: some were left as they are"] if result.no_room else []
    lines += [f"shard {shard}: left to its writer" for shard in in_use]
    say("compact", store, document, lines, as_json)
    if result.damaged:
        ctx.exit(ExitCode.PROBLEMS_FOUND)
    if result.newer:
        ctx.exit(ExitCode.PARTIAL)


def _rewritten(result: Rewritten) -> dict[str, Any]:
    return {
        "made": {new.file: [name.file for name in inputs] for new, inputs in result.made.items()},
        "erased": result.erased,
        "damaged": {name.file: text for name, text in result.damaged.items()},
        "newer": [name.file for name in result.newer],
        "no_room": result.no_room,
    }


@click.command("expire")
@STORE
@click.option("--keep-bytes", metavar="SIZE", help="Most to keep of them together, or none.  [default: 2GiB]")
@click.option("--keep-for", metavar="TIME", help="How long to keep it, or none.  [default: 24h]")
@DRY_RUN
@json_option("expire")
@click.pass_context
def expire(
    ctx: click.Context, store: Path, keep_bytes: str | None, keep_for: str | None, dry_run: bool, as_json: bool
) -> None:
    """Remove what is too old or too much from the shards of STORE whose writers have gone, the oldest first.

    What goes is counted in `gaps`. Shards that are being written keep themselves within their own bounds.

    \b
    insitu store expire ./insitu-store --keep-for 24h --dry-run
    insitu store expire ./insitu-store --keep-bytes 10GiB --keep-for 7d

    Exit codes: 0 done, 3 damaged segments were left as they are.
    """
    keep = load_for_command(keep_bytes=keep_bytes, keep_for=keep_for).keep
    with opened(store) as path:
        if dry_run:
            done = expire_in(path, keep, None)
        else:
            with Recorder(path) as recorder:
                done = expire_in(path, keep, recorder)
                refresh_catalog(path)
    num_bytes = sum(segment.num_bytes for segment in done.segments)
    document = {
        "dry_run": dry_run,
        "keep_bytes": keep.max_bytes,
        "keep_for_s": keep.max_age_s,
        "segments": [segment.name.file for segment in done.segments],
        "rows": done.num_rows,
        "bytes": num_bytes,
        "in_use": done.in_use,
        "damaged": [name.file for name in done.damaged],
        "newer": [name.file for name in done.newer],
    }
    verb = "would go" if dry_run else "gone"
    lines = [f"{len(done.segments)} segments, {done.num_rows:,} rows, {num_bytes / 1e6:.1f} MB {verb}; kept: {keep}"]
    lines += [f"shard {shard}: left to its writer" for shard in done.in_use]
    lines += [f"{name}: of a newer format, left as it is" for name in done.newer]
    if done.damaged:
        names = ", ".join(name.file for name in done.damaged)
        lines.append(f"damaged, so that nothing tells what would go: {names}; insitu store repair {store}")
    say("expire", store, document, lines, as_json)
    if done.damaged:
        ctx.exit(ExitCode.PROBLEMS_FOUND)
