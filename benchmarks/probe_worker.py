"""A process that runs what its driver asks for, a JSON line at a time: so that versions of insitu and libraries that
cannot share an environment take turns. Started by `benchmarks/workers.py`; of no use by itself.

Requests: `{"do": "open", "variant": NAME}`, and of those that are open `block` (steps of one, until they are durable),
`steps` (single steps of all, interleaved), `check` (what is on the disk), `micro` (taps, intervals), `close`.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from interleaving import interleaved
from probe_variants import Bare, Bench, HiddenStates, Hooked, Job
from row_files import SAFETENSORS, TORCH
from variant_names import (
    AGAIN,
    BOUNDARY,
    DETACHED,
    HIDDEN,
    HIDDEN_BESIDE,
    HOOKS,
    HOOKS_BESIDE,
    LENS,
    NNSIGHT,
    OFF,
    ROWS,
    T0,
    T0_STORED,
    T1,
    T1_EACH,
)
from worker_loop import serve

WARM_UP: Final = 6
"""Steps before the clock: learning, graphs of both variants, first imports, traces of peers."""


def probed() -> Any:
    """Return what needs insitu."""
    return import_module("probed_variants")


def peers() -> Any:
    """Return what needs nnsight or TransformerLens."""
    return import_module("peer_variants")


MAKE: Final[dict[str, Callable[[Bench], Bare]]] = {
    DETACHED: Bare,
    AGAIN: Bare,
    OFF: lambda bench: probed().Off(bench),
    BOUNDARY: lambda bench: probed().Probed(bench, t0="boundary"),
    T0: lambda bench: probed().Probed(bench),
    T0_STORED: lambda bench: probed().Probed(bench, store="t0"),
    T1: lambda bench: probed().Sampled(bench, 16, store="t1"),
    T1_EACH: lambda bench: probed().Sampled(bench, 1),
    ROWS: lambda bench: probed().RowsOfAllLayers(bench),
    HOOKS: lambda bench: Hooked(bench, "hooks", TORCH, on_thread=False),
    HOOKS_BESIDE: lambda bench: Hooked(bench, "hooks-beside", TORCH, on_thread=True),
    HIDDEN: lambda bench: HiddenStates(bench, "hidden", SAFETENSORS, on_thread=False),
    HIDDEN_BESIDE: lambda bench: HiddenStates(bench, "hidden-beside", SAFETENSORS, on_thread=True),
    NNSIGHT: lambda bench: peers().Nnsight(bench),
    LENS: lambda bench: peers().Lens(bench),
}


class Worker:
    """The variants of this process that are open."""

    def __init__(self, job: Job) -> None:
        self._bench = Bench(job)
        self._open: dict[str, Bare] = {}

    def do_open(self, variant: str) -> dict[str, Any]:
        """Make a variant and warm it up."""
        made = MAKE[variant](self._bench)
        for _ in range(WARM_UP):
            made.step()
        made.settle()
        self._open[variant] = made
        return {"num_sites": made.num_sites}

    def do_block(self, variant: str, steps: int) -> dict[str, Any]:
        """Run steps of one variant until all that they left is durable; seconds, and CPU-seconds of the process."""
        made = self._open[variant]
        gc.collect()
        cpu, began = time.process_time(), time.perf_counter()
        for _ in range(steps):
            made.step()
        made.settle()
        return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}

    def do_steps(self, variants: list[str], rounds: int, seed: int) -> dict[str, Any]:
        """Run single steps of some variants, interleaved at random."""
        ways = {name: self._open[name].step for name in variants}
        wall, cpu = interleaved(ways, rounds, random.Random(seed), warm_up=WARM_UP)
        for name in variants:
            self._open[name].settle()
        return {kind: {name: of[name].tolist() for name in of} for kind, of in (("wall", wall), ("cpu", cpu))}

    def do_check(self) -> dict[str, Any]:
        """Compare what is on the disk with what was to be kept."""
        compiled = self._bench.job.compiled
        found = {}
        for name, made in self._open.items():
            check = made.check()
            if check is not None:
                found[name] = {**asdict(check), "holds": check.holds(bits=made.needs_bits and not compiled)}
        sampled = {name: told for name, made in self._open.items() if (told := made.sampled())}
        return {"checks": found, "sampled": sampled}

    def do_micro(self, rounds: int, seed: int, width: int) -> dict[str, Any]:
        """Measure the smallest parts."""
        from probe_micro import measure

        return measure(rounds, seed, width)

    def do_versions(self, packages: list[str]) -> dict[str, Any]:
        """Return versions of packages that are installed here."""
        return {name: importlib.metadata.version(name) for name in packages}

    def do_close(self) -> dict[str, Any]:
        """Let go of all variants."""
        while self._open:
            self._open.popitem()[1].close()
        return {}


def main(job: Job) -> None:
    """Answer until there is nothing more to read."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        serve(lambda: Worker(job))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    main(Job(**{**asked, "folder": Path(asked["folder"])}))
