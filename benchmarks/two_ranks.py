"""Two pipeline ranks over gloo with insitu attached, one process each: each has half of the layers of a small model.

A scoring service: each step is two prompts of 16 tokens, and the last rank answers how likely they are. What the trials
(`trial_rigs.py`) make wrong is made here and in `two_rank_models.py`: a router that favours an expert, weights used
without their module, too much asked of the probe.

    MEETING=$(mktemp -u) INSITU_RUN=00112233445566aa
    for RANK in 0 1; do python benchmarks/two_ranks.py --rank $RANK --meeting $MEETING --to file://./store & done; wait
"""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import click
import torch
import torch.distributed as dist
from rig_plans import NUM_EXPERTS
from torch import nn
from two_rank_models import HIDDEN, LENGTH, PROMPTS, Stage, Witness, favour, prompts_of, whole_model

import insitu
from insitu.identity import boot_id

MEET_S: Final = 120.0
SEND_NS: Final = 1
"""Place in a header of when the sender handed the step on; before it stands the step's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a rank was asked for."""

    steps: int
    warmup: int
    period_s: float
    vocab: int
    capture: range
    """Steps whose rows are asked for."""
    cue: Path | None
    """The file that is made when `capture` begins."""
    burst: tuple[int, int]
    """In which step so many intervals are written at once."""


class Rank:
    """What both ranks do in a step."""

    def __init__(self, options: Options, stage: nn.Module, session: insitu.Session, one_clock: bool) -> None:
        self.options, self.stage, self.session, self.one_clock = options, stage, session, one_clock

    @contextlib.contextmanager
    def computing(self, number: int) -> Iterator[None]:
        """Open the step and its compute interval; ask for too much of the probe where that is the trial."""
        captured, session = number in self.options.capture, self.session
        rows = [
            insitu.Rows(f"p{number}.{at}", start=at * LENGTH, count=LENGTH, phase="prefill", capture=captured)
            for at in range(PROMPTS)
        ]
        if self.options.cue is not None and number == self.options.capture.start:
            self.options.cue.touch()
        with session.step(number, mb=number % 2, phase="prefill", rows=rows), session.interval("compute"):
            yield
            burst_at, burst = self.options.burst
            for _ in range(burst if number == burst_at else 0):
                with session.interval("host"):
                    pass

    def run(self) -> None:
        """Run all steps, inside one outer `host` interval."""
        with self.session.interval("host") as host:
            began = time.monotonic()
            for number in range(self.options.steps):
                host.step_id, host.mb = number, number % 2
                self.step(number, began + number * self.options.period_s)

    def step(self, number: int, due_s: float) -> None:
        raise NotImplementedError


class First(Rank):
    """Waits for the next two prompts to come, sends their hidden states on, and waits for the answer."""

    def step(self, number: int, due_s: float) -> None:
        session, fields = self.session, {"step_id": number, "mb": number % 2, "peer": 1}
        if number == self.options.warmup:
            session.event("warmup_end")
        if (left := due_s - time.monotonic()) > 0:
            with session.interval("idle"):
                time.sleep(left)
        with self.computing(number):
            hidden = self.stage(prompts_of(number, self.options.vocab))
        with session.interval("send_xfer", num_bytes=hidden.nbytes, **fields):
            header = torch.tensor([number, time.monotonic_ns()])
            sends: list[Any] = [dist.isend(header, 1), dist.isend(hidden.contiguous(), 1)]
        with session.interval("recv_wait", **fields | {"step_id": number + 1, "mb": (number + 1) % 2}):
            dist.recv(torch.empty(PROMPTS), 1)
        for work in sends:
            work.wait()


class Last(Rank):
    """Waits for hidden states and answers how likely each prompt is."""

    def step(self, number: int, due_s: float) -> None:
        session, fields = self.session, {"step_id": number, "mb": number % 2, "peer": 0}
        header, hidden = torch.empty(2, dtype=torch.int64), torch.empty(PROMPTS, LENGTH, HIDDEN)
        with session.interval("recv_wait", **fields) as wait:
            for tensor in (header, hidden):
                dist.recv(tensor, 0)
            sent: list[int] = header.tolist()
            assert sent[0] == number, f"step {sent[0]} arrived where step {number} was due"
            if self.one_clock:
                wait.turn("recv_xfer", sent[SEND_NS], num_bytes=hidden.nbytes)
            else:  # a stamp of another clock splits nothing: all of it stays `recv_wait`
                wait.num_bytes = hidden.nbytes
        with self.computing(number):
            logits = self.stage(hidden)
        with session.interval("sample", step_id=number, mb=number % 2):
            ids = prompts_of(number, self.options.vocab)[:, 1:, None]
            scores = logits[:, :-1].log_softmax(-1).gather(2, ids).sum((1, 2))
        dist.send(scores, 0)


def meet(rank: int, meeting: Path) -> bool:
    """Join the other rank; return whether its clock is ours."""
    wait = timedelta(seconds=MEET_S)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=wait)
    boots = [""] * 2
    dist.all_gather_object(boots, boot_id())
    return boots[0] == boots[1]


@click.command()
@click.option("--rank", type=click.IntRange(0, 1), required=True)
@click.option("--meeting", type=click.Path(path_type=Path), required=True, help="A file that is not there yet.")
@click.option("--to", required=True, help="Where records go.")
@click.option("--model", type=click.Choice(["llama", *NUM_EXPERTS]), default="llama", show_default=True)
@click.option("--vocab", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
@click.option("--steps", default=700, show_default=True)
@click.option("--warmup", default=100, show_default=True, help="How many of them are warm-up.")
@click.option("--period-ms", default=12.0, show_default=True, help="How often prompts come.")
@click.option("--favour", "favoured", type=(int, int, float), help="LAYER EXPERT SHARE: of all tokens.")
@click.option("--inline", default="", metavar="SITE", help="Use its module's weights and do not call it.")
@click.option("--rows", default="", metavar="SITES", help="Whose rows are taken in the steps of --capture.")
@click.option("--capture", type=(int, int), default=(0, 0), metavar="STEP COUNT")
@click.option("--cue", type=click.Path(path_type=Path), help="A file that is made when --capture begins.")
@click.option("--burst", type=(int, int), default=(0, 0), metavar="STEP COUNT", help="So many intervals in that step.")
def main(
    rank: int,
    meeting: Path,
    to: str,
    model: str,
    vocab: int,
    seed: int,
    favoured: tuple[int, int, float] | None,
    inline: str,
    rows: str,
    capture: tuple[int, int],
    period_ms: float,
    **rest: Any,
) -> None:
    """Run one rank; print one line of JSON: the probe's own account, and what a favoured router did."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    one_clock = meet(rank, meeting)
    whole = whole_model(model, vocab).eval()
    witness = None
    if favoured is not None:
        layer, expert, share_of_tokens = favoured
        favour(whole, layer, expert, share_of_tokens)
        witness = Witness(whole.model.layers[layer].mlp.gate, expert)
    stage = Stage(whole, rank, inline)
    options = Options(
        period_s=period_ms / 1e3,
        vocab=vocab,
        capture=range(capture[0], sum(capture)),
        **rest,
    )
    gc.collect()
    gc.freeze()  # what start-up made stays for good: no later collection has to walk it
    rules = [insitu.Rule(sites=rows)] if rows else []
    with (
        insitu.attach(stage, to=to, rules=rules, rank=rank, stage=rank, pp_rank=rank) as session,
        torch.inference_mode(),
    ):
        dist.barrier()
        (First if rank == 0 else Last)(options, stage, session, one_clock).run()
    dist.destroy_process_group()
    share = witness.num_chosen / witness.num_tokens if witness is not None and witness.num_tokens else None
    click.echo(json.dumps({"sources": [session.stats().to_json()], "share": share}))


if __name__ == "__main__":
    main()
