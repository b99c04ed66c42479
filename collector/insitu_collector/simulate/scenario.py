"""What a simulated run is asked to be: its grid, its load, its noise, and what goes wrong in it. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MS: Final = 1_000_000
SECOND: Final = 1_000_000_000
BEGIN_NS: Final = 1_000 * SECOND
UNIX_MINUS_MONO_NS: Final = 1_700_000_000 * SECOND
LAYERS: Final = 4
"""Of a stage."""
MOST_REQUESTS: Final = 8
"""Of a micro-batch: of warm-up's, and of traffic's unless the scenario says otherwise."""
MOST_RANKS: Final = 512
KINDS: Final = (
    "slow",
    "slow_link",
    "fail_slow",
    "gc",
    "hang",
    "hang_collective",
    "nan",
    "kv_small",
    "long_prompts",
    "underfilled",
    "silent_site",
    "drop",
    "experts",
    "foreign",
    "clock_offset",
    "clock_jump",
    "clock_unknown",
)
"""What can go wrong; `Fault` says what each is."""
_OF_STAGES: Final = (
    "slow",
    "slow_link",
    "gc",
    "hang",
    "hang_collective",
    "nan",
    "silent_site",
    "drop",
    "experts",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong from `at_s` on, counted from the end of warm-up, until `until_s`.

    Places: `stage` and, of its tensor-parallel ranks, `tp` (None: all), in replica `replica`; or `host` (what names a
    host ignores the stage, and `fail_slow` may do either).

    - "slow": every step takes `ms` longer there: asleep, or computing when `on_cpu`. With `tp` its peers wait for it
    - "slow_link": what `stage` sends to the next takes `ms` longer on its way
    - "fail_slow": every step takes `factor` as long, computing; reached over `ramp_s` (0: at once)
    - "gc": a pause of `ms` every `every_s`
    - "hang": one step of `ms` on one rank (`tp`, else the first of the stage); "hang_collective": all ranks of the
      stage have come to a collective that takes `ms`
    - "nan": layer `layer` of the stage, in one step
    - "kv_small": there is key/value memory for `size` token positions only
    - "long_prompts": a share `share` of requests bring a prompt of `size` tokens
    - "underfilled": only `size` micro-batches are kept in flight
    - "silent_site": the last site of the stage's layers never writes, whatever `at_s` says; logits still do
    - "drop": a share `share` of the stage's interval rows is lost where they are made, and counted
    - "experts": the router of layer `layer` of the stage has a share `share` of tokens choose one and the same expert
    - "foreign": other processes use `size` cores of the host
    - "clock_offset": the host's Unix clock is `ms` ahead, of which `clocks` says all; "clock_jump": its clock is set
      ahead by `ms`, of which `clocks` speaks only afterwards; "clock_unknown": `clocks` says nothing of the host
    """

    kind: str
    at_s: float = 0.0
    stage: int = 1
    until_s: float = 1e9
    ms: float = 25.0
    on_cpu: bool = False
    every_s: float = 1.0
    layer: int = 0
    tp: int | None = None
    replica: int = 0
    host: int | None = None
    factor: float = 1.5
    ramp_s: float = 0.0
    size: float = 0.0
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands in the grid, and on which host."""

    rank: int
    replica: int
    stage: int
    tp: int
    host: int

    @property
    def epoch(self) -> int:
        return 1 + self.rank


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run. Times of a step: `base_ms` by stage, plus a cost a row, a prefill row and a token of context."""

    seed: int = 0
    seconds: float = 20.0
    base_ms: tuple[float, ...] = (5.0, 6.5)
    """One entry a stage."""
    in_flight: int = 2
    requests_per_s: float = 8.0
    """Of a replica."""
    most_requests: int = MOST_REQUESTS
    """Of a micro-batch."""
    noise: float = 0.06
    """Sigma of the log of a service time."""
    tail: float = 0.03
    """Chance that a step is kept from its core for some milliseconds."""
    bursts: tuple[tuple[float, float, float], ...] = ()
    """(from s, to s, cores): foreign load, on every host."""
    faults: tuple[Fault, ...] = ()
    warmup_steps: int = 80
    param_bytes: tuple[int, ...] | None = None
    tensor_parallel: int = 1
    replicas: int = 1
    hosts: int = 1
    """Stages of a replica stand side by side on hosts; ranks of one stage share one where they can."""
    collectives: int = 2
    """Of a step, where a stage has more ranks than one."""
    prompt: tuple[int, int] = (4, 48)
    output: tuple[int, int] = (10, 59)
    """Tokens of a request: fewest and most."""
    experts: int = 0
    """Of each layer, behind a router; 0: layers without any."""
    experts_per_token: int = 2

    def __post_init__(self) -> None:
        unknown = {fault.kind for fault in self.faults} - set(KINDS)
        if unknown:
            raise ValueError(f"no fault {', '.join(sorted(unknown))}; the faults are {', '.join(KINDS)}")
        if not 1 <= self.num_ranks <= MOST_RANKS:
            raise ValueError(f"{self.num_ranks} ranks; a simulated run has 1 to {MOST_RANKS}")
        if not 1 <= self.hosts <= self.num_ranks:
            raise ValueError(f"{self.hosts} hosts for {self.num_ranks} ranks; each host has at least one")
        if self.experts and not 1 <= self.experts_per_token < self.experts:
            raise ValueError(f"a token cannot choose {self.experts_per_token} of {self.experts} experts and leave one")
        for fault in self.faults:
            self._check_place(fault)

    def _check_place(self, fault: Fault) -> None:
        inside = 0 <= fault.stage < self.stages and 0 <= fault.replica < self.replicas
        inside &= 0 <= (fault.tp or 0) < self.tensor_parallel and 0 <= (fault.host or 0) < self.hosts
        names_stage = fault.kind in _OF_STAGES
        if fault.kind == "experts" and not (self.experts and 0 <= fault.layer < LAYERS):
            raise ValueError(f"no layer {fault.layer} with experts; a stage has {LAYERS}, and experts if asked for")
        if fault.kind == "hang_collective" and self.tensor_parallel == 1:
            raise ValueError("ranks hang in a collective only where there is one: tensor_parallel is 1")
        if not inside and (names_stage or fault.host is not None):
            raise ValueError(f"the fault {fault.kind} is placed outside the grid: {fault}")

    @property
    def stages(self) -> int:
        return len(self.base_ms)

    @property
    def num_ranks(self) -> int:
        return self.replicas * self.stages * self.tensor_parallel

    def place(self, rank: int) -> Place:
        """Return where a rank stands: replicas, then stages, then tensor-parallel ranks count up."""
        rest, tp = divmod(rank, self.tensor_parallel)
        replica, stage = divmod(rest, self.stages)
        return Place(rank, replica, stage, tp, rank * self.hosts // self.num_ranks)

    def rank(self, replica: int, stage: int, tp: int) -> int:
        return (replica * self.stages + stage) * self.tensor_parallel + tp
