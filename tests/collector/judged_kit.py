"""A run as a judge that follows it sees it."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from insitu_collector.judge.judgement import Judgement
from insitu_collector.rows.slices import seconds
from insitu_collector.verdicts.finding import Verdict


def every_revision(tables: Mapping[str, pa.Table]) -> list[Verdict]:
    """Return every revision of a run that is judged a second at a time."""
    judgement = Judgement()
    told = [verdict for part in seconds(tables) for verdict in judgement.look(part)]
    return told + judgement.look({}, final=True)
