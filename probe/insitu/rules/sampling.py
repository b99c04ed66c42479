"""Which steps are sampled: decided by run and step alone, so that every rank decides alike. Pure."""

from __future__ import annotations

from typing import Final

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15


def hash64(run: str, step_id: int) -> int:
    """Return 64 well-mixed bits of a run (16 hex digits) and a step: the splitmix64 finaliser of Steele, Lea and
    Flood, "Fast Splittable Pseudorandom Number Generators" (2014)."""
    mixed = (int(run, 16) + (step_id + 1) * _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def is_sampled(run: str, step_id: int, every: int) -> bool:
    """Tell whether a step is one in `every`. Never by `step_id % every`: with two micro-batches in flight that
    would sample one of them for ever."""
    return hash64(run, step_id) % every == 0
