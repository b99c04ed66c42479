"""What `insitu serve` was asked for, and what follows from it once the checkpoint is open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from insitu_engine.blocks import BLOCK_SIZE, blocks_for
from insitu_engine.errors import EngineError
from insitu_engine.scheduler import Limits

if TYPE_CHECKING:
    from insitu_engine.checkpoint import Checkpoint

DTYPES: Final = ("float32", "bfloat16", "float16")
GRACE_S: Final = 5.0
"""How long requests in flight may go on after a stop is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The options of one server."""

    model: Path
    num_stages: int = 1
    split: tuple[int, ...] | None = None
    in_flight: int | None = None
    """Micro-batches in flight at once; None is one a stage, the least that can keep every stage busy."""
    host: str = "127.0.0.1"
    port: int = 8000
    to: str | None = None
    """Where the probe sends; None observes nothing."""
    dtype: str = "float32"
    device: str = "cpu"
    max_len: int | None = None
    """Most tokens of one request, prompt and output; None is what the model was made for."""
    max_batch: int = 16
    token_budget: int = 128
    max_queue: int = 64
    kv_bytes: int = 256 << 20
    """Most memory a rank gives to keys and values."""
    grace_s: float = GRACE_S
    sample: float | None = None
    """Share of requests whose rows are taken though they do not ask; None takes those of nobody else."""

    def __post_init__(self) -> None:
        if self.token_budget <= self.max_batch:
            raise EngineError(
                f"--token-budget {self.token_budget} leaves no room for prompts beside --max-batch {self.max_batch}; "
                "make it larger"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """How one checkpoint is laid out over the stages."""

    layers: tuple[range, ...]
    """Global layer indices of each stage."""
    limits: Limits
    max_len: int


def make_plan(config: EngineConfig, checkpoint: Checkpoint) -> Plan:
    """Return stages, KV blocks and the longest request. Raises EngineError where they do not fit."""
    import torch

    from insitu_engine import split
    from insitu_engine.kv_cache import bytes_per_block

    if config.split is None:
        counts = split.balanced(checkpoint.layer_bytes, checkpoint.head_bytes, config.num_stages)
    else:
        counts = split.checked(config.split, checkpoint.num_layers, config.num_stages)
    block_bytes = bytes_per_block(
        max(counts), checkpoint.num_kv_heads, checkpoint.head_dim, getattr(torch, config.dtype)
    )
    limit = checkpoint.config.max_position_embeddings
    max_len = min(config.max_len or limit, limit)
    num_slots = config.in_flight or config.num_stages
    num_blocks = min(config.kv_bytes // block_bytes, num_slots * config.max_batch * blocks_for(max_len))
    if num_blocks < 1:
        raise EngineError(f"--kv-mib {config.kv_bytes >> 20} does not hold one block of {block_bytes} bytes; raise it")
    limits = Limits(
        num_slots=num_slots,
        num_blocks=num_blocks,
        max_batch=config.max_batch,
        token_budget=config.token_budget,
        max_queue=config.max_queue,
    )
    return Plan(split.ranges(counts), limits, min(max_len, num_blocks * BLOCK_SIZE))
