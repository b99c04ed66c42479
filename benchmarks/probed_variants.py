"""Ways to run one model with insitu attached: idle, with T0, with statistics, and with the rows of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from probe_variants import Bare, Bench, Check

import insitu
from insitu.testing import Recording

FLUSH_S: Final = 30.0
ROOM_S: Final = 0.2
"""How long to wait for acknowledgements before looking for room again."""


class NotDurable(Exception):
    """A flush ended with rows that are not on disk: nothing measured up to there can be believed."""


def wait_until_durable(session: insitu.Session) -> None:
    """Flush; raise NotDurable where rows are left."""
    report = session.flush(FLUSH_S)
    if report.pending or report.dropped:
        raise NotDurable(f"after a flush of {FLUSH_S:.0f} s {report.pending} rows wait, {report.dropped} are dropped")


class Probed(Bare):
    """Attached; the row map of each step is stated, as an engine would. In memory, unless a store is asked for."""

    def __init__(
        self, bench: Bench, rules: Sequence[insitu.Rule] = (), *, store: str | None = None, **settings: Any
    ) -> None:
        self._rules = rules
        self._settings = settings
        self._store = bench.job.folder / store if store is not None else None
        super().__init__(bench)

    def prepared(self, model: Any) -> Any:
        self.to = Recording()
        where = self.to if self._store is None else f"file://{self._store}"
        rows = max(64, self.bench.job.num_rows)
        self.session = insitu.attach(model, to=where, rules=self._rules, max_rows=rows, **self._settings)
        return model

    def forward(self, ids: torch.Tensor) -> None:
        with self.stated(self.session):
            self.run(input_ids=ids, use_cache=False)

    def stated(self, session: insitu.Session) -> Any:
        """Return the open step of a batch."""
        batch, tokens = self.bench.job.batch, self.bench.job.tokens
        rows = [insitu.Rows(f"r{i}", i * tokens, tokens, self.num_steps) for i in range(batch)]
        return session.step(rows=rows, phase="decode" if tokens == 1 else "prefill")

    def settle(self) -> None:
        wait_until_durable(self.session)

    @property
    def num_sites(self) -> int:
        return len(self.session.sites())

    def table(self, name: str) -> Any:
        """Return a table as it is stored, read again."""
        if self._store is None:
            return self.to.table(name)
        from insitu_collector import open_store

        return open_store(self._store).table(name)

    def check(self) -> Check | None:
        return Check(self.num_steps, len(self.table("steps")))

    def close(self) -> None:
        self.session.close(FLUSH_S)


class Off(Probed):
    """The session of INSITU_DISABLED=1: steps are stated to it, nothing is done."""

    def prepared(self, model: Any) -> Any:
        self.session = insitu.off()
        return model

    def settle(self) -> None:
        return None

    def check(self) -> Check | None:
        return None

    def close(self) -> None:
        return None


class Sampled(Probed):
    """With statistics of all sites in one step of `every`."""

    def __init__(self, bench: Bench, every: int, **settings: Any) -> None:
        super().__init__(bench, [insitu.Rule(sites="*", take="summary", every=every)], overhead_budget=1.0, **settings)

    def settle(self) -> None:
        """What found no place counts as dropped, the first step's at least; `sampled` tells it."""
        if left := self.session.flush(FLUSH_S).pending:
            raise NotDurable(f"after a flush of {FLUSH_S:.0f} s {left} rows wait")

    def sampled(self) -> dict[str, int] | None:
        """A site without a place costs its step less."""
        untaken = sum(self.session.stats().dropped.get("statistics", {}).values())
        return {"steps": self.num_steps, "sampled": len(self.table("sampling")), "untaken": untaken}

    def check(self) -> Check | None:
        """Hold steps, and a row of statistics a site of those that were sampled."""
        expected = self.num_steps + len(self.table("sampling")) * self.num_sites
        return Check(expected, len(self.table("steps")) + len(self.table("statistics")))


class RowsOfAllLayers(Probed):
    """What every layer hands on, of every token, in a store; steps wait for room, so that nothing is dropped."""

    def __init__(self, bench: Bench) -> None:
        rules = [insitu.Rule(sites="L*.resid_post", requests="all")]
        super().__init__(bench, rules, store="rows", overhead_budget=1.0)

    def forward(self, ids: torch.Tensor) -> None:
        while not self.session.has_room:
            self.session.flush(ROOM_S)
        super().forward(ids)

    def check(self) -> Check | None:
        """The first step learns how wide rows are, and takes none."""
        names = {site.number: site.layer for site in self.session.sites()}
        kept: dict[int, list[NDArray[np.float32]]] = {}
        captures = self.table("captures").sort_by([("step_id", "ascending"), ("row", "ascending")])
        step, row_site = captures["step_id"].to_numpy(), captures["site"].to_numpy()
        layer = np.array([names[site] for site in row_site.tolist()])
        bounds = np.flatnonzero(np.diff(step, prepend=-1))
        for first, last in zip(bounds, [*bounds[1:], len(step)], strict=True):
            data = np.array(captures["data"].slice(first, last - first).to_pylist(), object)
            of = layer[first:last]
            kept[int(step[first])] = [
                np.stack([np.frombuffer(each, np.float32) for each in data[of == at]]) for at in np.unique(of)
            ]
        return self.bench.compare(kept, self.num_steps - 1)
