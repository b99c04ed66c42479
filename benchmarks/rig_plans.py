"""What a two-rank trial does, drawn from its seed, and whether what was said of it is right. Pure."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trial_rules import MIN_FOREIGN_SHARE, QUIET, Ruling

from insitu.vocabulary import VerdictKind

PIPELINE, TENSOR = "benchmarks/two_ranks.py", "examples/03_tensor_parallel.py"
"""The programs that the ranks run."""
LATE_MS: Final = (4.0, 10.0)
"""How late a straggler is; `straggler_rank` is told from 1 ms on, from 2 ms where the rank computes longer, and from
20 and 30 % of a step without it, which takes about 1 ms here."""
LATE_S: Final = 8.0
SHARES: Final = (0.85, 1.0)
"""Of all tokens: what a router is to send to the expert that it favours, to some points."""
NUM_EXPERTS: Final = {"mixtral": 8, "qwen3-moe": 16}
HOT_SHARE: Final = 0.7
"""Share of the tokens from which on `expert_imbalance` is told: each of these chooses a quarter of its experts."""
MARGIN: Final = 1.1
"""A trial's router must be beyond it by this factor; what is drawn is, by more than it is off."""
SHARE_ERROR: Final = 0.05
"""By how much the share that is told may differ from the counted one: it is of one step in 16, without warm-up."""
TOO_SHORT, CONTENDED = "inconclusive: too little traffic: ", "inconclusive: others use this host so much"
"""How `inconclusive` begins where a run in which nothing was done may be called so."""
SITES: Final = (("embed", "L0.mlp_out", "L1.mlp_out"), ("L2.mlp_out", "L3.mlp_out", "final_norm", "logits"))
"""By rank: the sites whose weights can be used without their module."""
AHEAD_S: Final = (1_000, 1_000_000)
"""How far the second host's CLOCK_MONOTONIC is ahead of the first's."""
STOP_S: Final = (2.0, 3.5)
"""How long the collector is stopped. Rows worth 2 MiB a step are asked for meanwhile: the probe holds 80 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """One trial: what runs, and what must be said of it."""

    kind: str
    did: str
    """In words."""
    program: str = PIPELINE
    options: tuple[str, ...] = ()
    """Of both ranks, ..."""
    own: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """... and of each."""
    rank: int | None = None
    """The rank that must be named."""
    site: str | None = None
    says: str = ""
    """What the verdict's text must have."""
    max_rows: int | None = None
    """Rows of a step that the probe of `rank` has room for."""
    stop_s: float = 0.0
    """How long the collector is stopped."""
    ahead_s: int | None = None
    """On two hosts: how far the second one's clock is ahead of the first one's."""
    by_file: bool = False
    """Whether the ranks write the store themselves: then nobody compares their clocks."""
    lost: str = ""
    """The table of which rows must be missing."""
    least_share: float | None = None
    """Of the tokens that the favoured expert must really have got, for the trial to be one."""


EXPECTED: Final[dict[str, VerdictKind | None]] = {
    "straggler": VerdictKind.STRAGGLER_RANK,
    "experts": VerdictKind.EXPERT_IMBALANCE,
    "silent-site": VerdictKind.SITE_NEVER_FIRED,
    "drops": VerdictKind.RECORDS_DROPPED,
    "clock": VerdictKind.CLOCK_UNCERTAIN,
    "two-hosts": None,
}
"""Kind of trial -> the verdict that must be said; of `two-hosts`, that nothing is wrong."""
NEED_NAMESPACES: Final = frozenset({"clock", "two-hosts"})
"""Kinds whose second host is made of namespaces, which takes CAP_SYS_ADMIN."""


def draw_rig(kind: str, seed: int) -> Rig:
    """Return the trial of this kind and seed."""
    return _DRAWS[kind](random.Random(f"rig-{kind}-{seed}"), seed)


def _straggler(rng: random.Random, seed: int) -> Rig:
    rank, busy, late_ms, after = rng.randrange(2), rng.random() < 0.5, rng.uniform(*LATE_MS), rng.randint(100, 800)
    steps = after + int(LATE_S * 1e3 / (late_ms + 1.0))
    options = ["--late", str(rank), "--ms", f"{late_ms:.2f}", "--after", str(after), "--steps", str(steps)]
    how = "computes" if busy else "sleeps"
    return Rig(
        kind="straggler",
        did=f"rank {rank} {how} {late_ms:.1f} ms longer from step {after} on",
        program=TENSOR,
        options=(*options, *(["--busy"] if busy else [])),
        rank=rank,
        says="; computing: " if busy else "; kept from computing: ",
    )


def _experts(rng: random.Random, seed: int) -> Rig:
    model, layer = rng.choice(tuple(NUM_EXPERTS)), rng.randrange(4)
    expert, share = rng.randrange(NUM_EXPERTS[model]), rng.uniform(*SHARES)
    return Rig(
        kind="experts",
        did=f"{model}, layer {layer}: the router sends {100 * share:.0f} % of the tokens to expert {expert}",
        options=("--model", model, "--seed", str(seed), "--favour", str(layer), str(expert), f"{share:.3f}"),
        rank=layer // 2,
        site=f"L{layer}.router_logits",
        says=f"expert {expert} is chosen by ",
        least_share=MARGIN * HOT_SHARE,
    )


def _silent_site(rng: random.Random, seed: int) -> Rig:
    rank = rng.randrange(2)
    site = rng.choice(SITES[rank])
    return Rig(
        kind="silent-site",
        did=f"rank {rank} uses the weights of {site} without its module",
        options=("--seed", str(seed), "--steps", "500", "--inline", site),
        rank=rank,
        site=site,
        says=f"1 site of rank {rank} (stage {rank}) never fired in the first steps: {site}; ",
    )


def _drops(rng: random.Random, seed: int) -> Rig:
    """Rows beyond the slab, intervals beyond their ring, or a collector that stands still, in turn."""
    at, ways = rng.randint(250, 400), (_crowded, _burst, _stopped)
    return ways[seed % len(ways)](rng, at)


def _crowded(rng: random.Random, at: int) -> Rig:
    rank, room, count = rng.randrange(2), rng.choice((4, 8, 16)), rng.randint(20, 200)
    asked = ("--rows", "L*.resid_post", "--capture", str(at), str(count))
    return Rig(
        kind="drops",
        did=f"rank {rank} has room for {room} of 32 rows, all of which are asked for in {count} steps from {at} on",
        own=(asked, ()) if rank == 0 else ((), asked),
        rank=rank,
        says="of captures (slab_full)",
        max_rows=room,
        lost="captures",
    )


def _burst(rng: random.Random, at: int) -> Rig:
    rank, count = rng.randrange(2), rng.randint(25_000, 40_000)  # two rows each, and the ring holds 32,768
    asked = ("--burst", str(at), str(count))
    return Rig(
        kind="drops",
        did=f"rank {rank} writes {count} intervals within step {at}",
        own=(asked, ()) if rank == 0 else ((), asked),
        rank=rank,
        says="of intervals (ring_full)",
        lost="intervals",
    )


def _stopped(rng: random.Random, at: int) -> Rig:
    stop_s = rng.uniform(*STOP_S)
    return Rig(
        kind="drops",
        did=f"the collector stands still for {stop_s:.1f} s, while rank 1 is asked for 200 MiB of logits",
        options=("--vocab", "16384"),
        own=((), ("--rows", "logits", "--capture", str(at), "100")),
        rank=1,
        says="of captures (queue_full)",
        stop_s=stop_s,
        lost="captures",
    )


def _hosts(kind: str) -> Callable[[random.Random, int], Rig]:
    def drawn(rng: random.Random, seed: int) -> Rig:
        ahead_s, by_file = rng.randint(*AHEAD_S), kind == "clock"
        how = "both write the store themselves" if by_file else "both ship to one collector"
        return Rig(
            kind=kind,
            did=f"two hosts, the second one's clock {ahead_s} s ahead; {how}",
            options=("--seed", str(seed)),
            rank=None,
            says="it was never compared with the first host's clock" if by_file else "",
            ahead_s=ahead_s,
            by_file=by_file,
        )

    return drawn


_DRAWS: Final[Mapping[str, Callable[[random.Random, int], Rig]]] = {
    "straggler": _straggler,
    "experts": _experts,
    "silent-site": _silent_site,
    "drops": _drops,
    "clock": _hosts("clock"),
    "two-hosts": _hosts("two-hosts"),
}
assert _DRAWS.keys() == EXPECTED.keys(), "every kind is drawn and ruled"


def rule_rig(
    rig: Rig,
    verdicts: Sequence[Mapping[str, Any]],
    foreign_share: float,
    share: float | None,
    *,
    revised: int = 0,
) -> Ruling:
    """Judge what was said. foreign_share: of the cores, what others used. share: what a witness counted at a router.

    revised: how many verdicts were withdrawn.
    """
    expected = EXPECTED[rig.kind]
    named = [verdict for verdict in verdicts if expected is not None and _is_it(verdict, rig, expected)]
    allowed = _allowed(rig, foreign_share)
    wrong = [_told(verdict) for verdict in verdicts if verdict not in named and verdict["kind"] not in allowed]
    missed = [] if named or expected is None else [f"no {expected} that says {rig.says!r}"]
    if not verdicts:
        missed.append("nothing was said at all")
    if expected is None:
        missed += [_told(verdict) for verdict in verdicts if _is_unexcused(verdict, foreign_share)]
    if revised:
        missed.append(f"{revised} verdicts were withdrawn")
    if rig.least_share is not None:
        missed += _share_errors(rig, named, share)
    return Ruling(not wrong and not missed, wrong, missed)


def _allowed(rig: Rig, foreign_share: float) -> frozenset[str]:
    """Return the kinds that may be said of anything: to each of two hosts on one machine the other is foreign."""
    shared = foreign_share >= MIN_FOREIGN_SHARE or rig.ahead_s is not None
    return QUIET | (frozenset({"host_contended"}) if shared else frozenset())


def _is_unexcused(verdict: Mapping[str, Any], foreign_share: float) -> bool:
    """Tell whether it says that nothing can be said, though there were time and cores."""
    excused = any(reason in verdict["text"] for reason in (TOO_SHORT, CONTENDED)) or foreign_share >= MIN_FOREIGN_SHARE
    return verdict["kind"] == "inconclusive" and not excused


def _is_it(verdict: Mapping[str, Any], rig: Rig, expected: VerdictKind) -> bool:
    place = (verdict["kind"], verdict["stage"], verdict["rank"], verdict["site"])
    stage = 0 if rig.program == TENSOR else rig.rank
    return place == (str(expected), stage, rig.rank, rig.site) and rig.says in verdict["text"]


def _share_errors(rig: Rig, named: Sequence[Mapping[str, Any]], share: float | None) -> list[str]:
    assert rig.least_share is not None, "asked of trials of routers only"
    if share is None or share < rig.least_share:
        return [f"the router sent only {share} of the tokens there: that is no trial of {rig.kind}"]
    told = [float(verdict["text"].partition(rig.says)[2].partition(" %")[0]) / 100 for verdict in named]
    return [f"told {each}, counted {share:.3f} of the tokens" for each in told if abs(each - share) > SHARE_ERROR]


def _told(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['kind']} at stage {verdict['stage']} rank {verdict['rank']}: {verdict['text']}"


def row_errors(rig: Rig, sources: Sequence[Mapping[str, Any]], stored: Mapping[str, int]) -> list[str]:
    """Return the tables whose rows do not add up to produced = stored + dropped, and what should be missing and is not.

    sources: the account of each process that wrote. stored: rows by table.
    """
    produced, dropped = Counter[str](), Counter[str]()
    for source in sources:
        produced.update(source["produced"])
        dropped.update({table: sum(reasons.values()) for table, reasons in source["dropped"].items()})
    errors = [
        f"{table}: {produced[table]} produced, {stored.get(table, 0)} stored, {dropped[table]} dropped"
        for table in sorted(produced | Counter(stored))
        if produced[table] != stored.get(table, 0) + dropped[table]
    ]
    if rig.lost and not dropped[rig.lost]:
        errors.append(f"no row of {rig.lost} was lost: that is no trial of {rig.kind}")
    if not rig.lost and dropped.total():
        errors.append(f"{dropped.total()} rows were dropped, of {', '.join(sorted(dropped))}")
    return errors
