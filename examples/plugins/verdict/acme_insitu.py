"""A verdict plug-in: requests that arrived long ago and have not ended. How to write one: docs/extending.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from insitu_collector.evidence import Evidence
from insitu_collector.verdicts import Finding

PROMISED_NS: Final = 1_500_000_000
"""What we promised our users."""


class SlowRequest:
    """Says `acme.slow_request` while any request has been open for longer than was promised."""

    def look(self, evidence: Evidence) -> Iterable[Finding]:
        late = {
            request: arrived_ns
            for request, arrived_ns in evidence.open_requests.items()
            if evidence.now_ns - arrived_ns > PROMISED_NS
        }
        if not late:
            return
        begin_ns = min(late.values())
        longest_s = (evidence.now_ns - begin_ns) / 1e9
        yield Finding(
            kind="acme.slow_request",
            text=f"{len(late)} requests take longer than the {PROMISED_NS / 1e9:g} s that were promised, "
            f"the longest {longest_s:.1f} s so far.",
            remedy="See what else is said of this window; if nothing is, admit fewer requests at a time.",
            t0_ns=begin_ns,
            t1_ns=evidence.now_ns,
            requests=tuple(late),
            size=longest_s,
        )
