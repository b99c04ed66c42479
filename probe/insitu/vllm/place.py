"""Where a worker stands in vLLM's grid of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """Numbers as `insitu.identity.Source` has them; `rank` counts within one replica."""

    rank: int
    replica: int
    tp_rank: int
    pp_rank: int
    ep_rank: int
    num_stages: int
    previous: int
    """Rank of the stage before with the same place in it; its own where there is one stage."""
    next: int
    last_stage: int

    @property
    def is_first(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        return self.pp_rank == self.num_stages - 1

    @property
    def fields(self) -> dict[str, int]:
        """What `insitu.attach` and `insitu.start` are told."""
        return {
            "rank": self.rank,
            "stage": self.pp_rank,
            "replica": self.replica,
            "dp_rank": self.replica,
            "tp_rank": self.tp_rank,
            "pp_rank": self.pp_rank,
            "ep_rank": self.ep_rank,
        }


def replica_of(config: Any) -> int:
    """Return which engine of data parallel ones this is. config: vLLM's `ParallelConfig`.

    Its data_parallel_rank is 0 in each engine of a dense model, as these run without knowing of each other.
    """
    return int(config.data_parallel_index)


def place_of(worker: Any) -> Place:
    """Return a worker's place, once vLLM has made its groups."""
    from vllm.distributed import parallel_state

    pipeline, tensor = parallel_state.get_pp_group(), parallel_state.get_tp_group()
    expert = parallel_state.get_ep_group().rank_in_group if worker.parallel_config.enable_expert_parallel else 0
    at, ranks = pipeline.rank_in_group, pipeline.ranks
    rank_of = [worker.rank + each - ranks[at] for each in ranks]
    return Place(
        rank=worker.rank,
        replica=replica_of(worker.parallel_config),
        tp_rank=tensor.rank_in_group,
        pp_rank=at,
        ep_rank=expert,
        num_stages=len(ranks),
        previous=rank_of[at - 1],
        next=rank_of[(at + 1) % len(ranks)],
        last_stage=rank_of[-1],
    )
