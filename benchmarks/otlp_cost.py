"""What sending to a receiver of OTLP costs beside a store in a folder: the same steps, in turns.

python benchmarks/otlp_cost.py             # 150 rounds of 40 steps, about five minutes
python benchmarks/otlp_cost.py --quick     # 12 rounds

Copies of tiny-llama that share their weights, decoding eight requests of which each has a sampled trace: detached, with
`to="file://..."`, with another store in a folder that `insitu subscribe` sends on meanwhile, and with `to="otlp://..."`.
The receiver is an `insitu collect`, which keeps what it takes. Ratios are of the CPU time that the step thread used for
a block of steps, which others on the machine change least; wall time stands beside it. Blocks are flushed outside of
the clock; CPU of the process is of all its threads, block and flush. At the end the receiver has to hold a span for
each interval of the sessions that sent there.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Final

import torch
from collector_rig import collecting
from foreign import Foreign
from interleaving import Times, interleaved
from llamas import NAMES, build, twin
from overhead_figures import Cost, Ratio, cost, noise, paired
from overhead_rig import cpu_of

import insitu
from insitu_collector.store import open_store
from insitu_engine.processes import Children

DETACHED, AGAIN, FILE, SENT_ON, OTLP = "detached", "detached, again (A/A)", "file", "file + subscribe", "otlp"
BATCH: Final = 8
STORED_S: Final = 120.0
TOO_NOISY: Final = 5
CONTEXTS: Final = [
    insitu.request_context({"traceparent": f"00-{number:032x}-{number:016x}-01"}) for number in range(1, BATCH + 1)
]


@dataclass
class Way:
    """One way to run steps, and the CPU-seconds of each of its blocks."""

    model: Any
    session: Any = None
    """None: nothing is attached."""
    cpu_s: float = 0.0
    num_steps: int = 0

    def run(self, num_steps: int) -> None:
        """Decode a token of each request, so many times."""
        self._began = time.process_time()
        ids = torch.zeros((BATCH, 1), dtype=torch.long)
        for _ in range(num_steps):
            if self.session is None:
                self.model(input_ids=ids, use_cache=False)
                continue
            rows = [
                insitu.Rows(f"req-{row}", start=row, count=1, position=self.num_steps, trace=context)
                for row, context in enumerate(CONTEXTS)
            ]
            with self.session.step(rows=rows):
                self.model(input_ids=ids, use_cache=False)
            self.num_steps += 1

    def flush(self) -> None:
        """Wait until the destination has what came of a block."""
        if self.session is not None:
            self.session.flush(STORED_S)
        self.cpu_s += time.process_time() - self._began


@dataclass(frozen=True)
class Found:
    """What a run measured."""

    steps: dict[str, Cost]
    ratios: list[Ratio]
    """CPU of the step thread over detached, and of `otlp` and `file + subscribe` over `file`."""
    cpu_us: dict[str, float]
    """Of this process, a step: the model, the step thread, and the probe's own threads."""
    beside_us: dict[str, float]
    """Of the subscriber and the receiver, a step sent to it."""
    num_spans: int
    foreign_share: float


def measured(model_name: str, rounds: int, num_steps: int, seed: int, folder: Path) -> Found:
    """Run all ways in turns. Raises AssertionError where spans are missing, ChildFailed, TimeoutError."""
    with (
        torch.inference_mode(),
        collecting(folder / "received") as receiver,
        Children() as children,
        ExitStack() as sessions,
    ):
        model = build(model_name)
        ways = {
            DETACHED: Way(model),
            AGAIN: Way(twin(model)),
            FILE: _attached(model, f"file://{folder}/kept", sessions),
            SENT_ON: _attached(model, f"file://{folder}/sent-on", sessions),
            OTLP: _attached(model, f"otlp://{receiver.address}", sessions),
        }
        command = ["subscribe", str(folder / "sent-on"), "--to", f"grpc://{receiver.address}"]
        subscriber = children.start("insitu subscribe", command)
        subscriber.wait_for_line("sending .* until", STORED_S, children.interrupted)
        began = {pid: cpu_of(pid) for pid in (subscriber.process.pid, receiver.pid)}
        with Foreign() as foreign:
            runs: dict[str, Callable[[], None]] = {name: _run(way, num_steps) for name, way in ways.items()}
            wall, cpu = interleaved(runs, rounds, random.Random(seed), after=lambda name: ways[name].flush())
        sessions.close()
        num_spans = sum(ways[name].session.stats().produced["intervals"] for name in (SENT_ON, OTLP))
        _wait_for_spans(folder / "received", num_spans)
        used_us = {pid: (cpu_of(pid) - before) * 1e6 for pid, before in began.items()}
    total = rounds * num_steps
    return Found(
        {name: cost(name, seconds / num_steps) for name, seconds in wall.items()},
        _ratios(cpu),
        {name: way.cpu_s * 1e6 / total for name, way in ways.items()},
        {"subscriber": used_us[subscriber.process.pid] / total, "receiver": used_us[receiver.pid] / (2 * total)},
        num_spans,
        foreign.share,
    )


def _attached(model: Any, to: str, sessions: ExitStack) -> Way:
    own = twin(model)
    return Way(own, sessions.enter_context(insitu.attach(own, to=to, overhead_budget=1.0)))


def _run(way: Way, num_steps: int) -> Callable[[], None]:
    return lambda: way.run(num_steps)


def _ratios(cpu: Times) -> list[Ratio]:
    over_detached = [paired(name, cpu[DETACHED], cpu[name]) for name in (AGAIN, FILE, SENT_ON, OTLP)]
    return [*over_detached, *(paired(f"{name}, over file", cpu[FILE], cpu[name]) for name in (SENT_ON, OTLP))]


def _wait_for_spans(store: Path, num_spans: int) -> None:
    """Wait until the receiver has them. Raises AssertionError for fewer in the end, or more."""
    pause, deadline = Event(), time.monotonic() + STORED_S
    while True:
        found = sum(batch.num_rows for batch in open_store(store).scan("spans"))
        if found >= num_spans or time.monotonic() > deadline:
            assert found == num_spans, f"the receiver has {found} spans of {num_spans} intervals"
            return
        pause.wait(0.2)


def report(found: Found) -> list[str]:
    """Return the tables of docs/benchmarks.md."""
    over = {ratio.name: ratio for ratio in found.ratios}
    lines = [
        "| way | a step, wall | CPU of the step thread over detached | over file | CPU of the process, a step |",
        "|---|---|---|---|---|",
    ]
    for name, step in found.steps.items():
        columns = (over.get(name), over.get(f"{name}, over file"))
        told = [f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" if ratio else "" for ratio in columns]
        cells = (name, f"{step.median_ns / 1e6:.2f} ms", *told, f"{found.cpu_us[name]:,.0f} us")
        lines.append(f"| {' | '.join(cells)} |")
    beside = ", ".join(f"{who} {spent:,.0f} us" for who, spent in found.beside_us.items())
    return [*lines, "", f"Beside it, CPU a step: {beside}. {found.num_spans:,} spans, all found."]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=NAMES, default="tiny")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="12 rounds of 10 steps")
    asked = parser.parse_args()
    rounds, num_steps = (12, 10) if asked.quick else (asked.rounds, asked.steps)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(asked.model, rounds, num_steps, asked.seed, Path(folder))
    print("\n".join(report(found)))
    print(f"{rounds} rounds of {num_steps} steps; others took {found.foreign_share:.1%} of the cores")
    reasons = noise(found.ratios, found.foreign_share)
    for reason in reasons:
        print(f"too noisy: {reason}", file=sys.stderr)
    return TOO_NOISY if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
