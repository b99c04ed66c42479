"""Making a store whole: dead shards recovered, damaged segments salvaged, catalog and twins made again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from insitu.segments.erased_file import ErasedFile
from insitu.segments.layout import OPEN, REPLACING, SEALED, SegmentName, files_in, list_segments
from insitu_collector.keeping.catalog import catalog_path, refresh
from insitu_collector.keeping.passes import write_twins
from insitu_collector.keeping.recorder import Recorder
from insitu_collector.keeping.rewriting import Rewriter, Rewritten
from insitu_collector.keeping.shards import shards_of
from insitu_collector.keeping.twins import list_twins, remove_twin, sweep_twins
from insitu_collector.keeping.verifying import MOVE, Verified, verify


@dataclass
class Repaired:
    """What was done, or would be."""

    recovered: list[SegmentName] = field(default_factory=list)
    """Open files of writers that have gone."""
    salvaged: list[SegmentName] = field(default_factory=list)
    """Damaged segments: what is whole of them is kept, the originals are in quarantine."""
    kept_twins: list[SegmentName] = field(default_factory=list)
    """Twins of those, which may have rows that are lost: in quarantine beside the originals."""
    twins: list[SegmentName] = field(default_factory=list)
    """Made anew."""
    catalog: bool = False
    """It is made again."""
    in_use: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    """Damaged segments that wait for the end of a writer: file and shard."""
    newer: list[SegmentName] = field(default_factory=list)


def plan(store: Path) -> Repaired:
    """Return what a repair would do. Changes nothing. Raises OSError."""
    found = verify(store)
    result = Repaired(in_use=found.in_use, catalog=_has_bad_catalog(found))
    newer = {problem.file for problem in found.problems if problem.kind == "newer"}
    begun = [name for name in list_segments(store, OPEN) if name.shard not in found.in_use]
    result.newer = [name for name in [*begun, *list_segments(store, SEALED)] if name.file in newer]
    result.recovered = [name for name in begun if name.file not in newer]
    result.recovered += [name for name in files_in(store, REPLACING, ".json") if name.shard not in found.in_use]
    bad = {problem.file for problem in found.problems if problem.kind == "damaged"}
    result.left = [
        (problem.file, problem.waits_for)
        for problem in found.problems
        if problem.kind == "damaged" and problem.waits_for
    ]
    result.salvaged = [
        name for name in list_segments(store, SEALED) if name.file in bad and name.shard not in found.in_use
    ]
    there = list_twins(store)
    result.kept_twins = [name for name in result.salvaged if name in there]
    twins = {problem.file for problem in found.problems if problem.kind == "twin" and problem.remedy != MOVE}
    result.twins = [name for name in there if f"twins/{name.file}" in twins and name not in result.kept_twins]
    return result


def repair(store: Path, recorder: Recorder) -> Repaired:
    """Do what can be done while the writers of a store go on. Raises OSError."""
    result = plan(store)
    erased = ErasedFile(store).read()
    for shard in shards_of(store):
        with recorder.hold(shard) as held:
            if held is None:
                continue
            rewritten = Rewritten()
            rewriter = Rewriter(store, held)
            for name in result.salvaged:
                if name.shard == shard:
                    rewriter.salvage(name, erased, recorder.tell, rewritten)
    for name in result.twins:
        remove_twin(store, name)
    sweep_twins(store)
    there = set(list_segments(store, SEALED))
    write_twins(store, [name for name in result.twins if name in there], erased)
    if result.catalog:
        catalog_path(store).unlink(missing_ok=True)
    refresh(store)
    return result


def _has_bad_catalog(found: Verified) -> bool:
    return any(problem.kind == "catalog" and problem.remedy != MOVE for problem in found.problems)
