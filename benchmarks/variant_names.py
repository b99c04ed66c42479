"""What the variants of `make bench-probe` are called, and where each runs. Imports nothing."""

from __future__ import annotations

from typing import Final

DETACHED: Final = "detached"
AGAIN: Final = "A/A (detached again)"
OFF: Final = "off (INSITU_DISABLED=1)"
BOUNDARY: Final = "attached, idle (t0=boundary)"
T0: Final = "T0"
T0_STORED: Final = "T0, stored"
T1: Final = "T0 and T1 in 1 of 16, stored"
T1_EACH: Final = "T0 and T1 in each step"
ROWS: Final = "rows of all layers: insitu"
HOOKS: Final = "hooks, clone, torch.save"
HOOKS_BESIDE: Final = "hooks, clone, torch.save on a thread"
HIDDEN: Final = "output_hidden_states, safetensors"
HIDDEN_BESIDE: Final = "output_hidden_states, safetensors on a thread"
NNSIGHT: Final = "nnsight cache, safetensors on a thread"
LENS: Final = "TransformerLens caching hooks, safetensors on a thread"

STEP_VARIANTS: Final = (DETACHED, AGAIN, OFF, BOUNDARY, T0, T1_EACH)
"""Compared step by step, in memory."""
STORED: Final = (DETACHED, AGAIN, T0_STORED, T1, ROWS, HOOKS, HOOKS_BESIDE, HIDDEN, HIDDEN_BESIDE)
"""Compared in blocks, until all is on the disk: of one process."""
LIBRARIES: Final = {NNSIGHT: ("nnsight", "nnsight"), LENS: ("lens", "transformer-lens")}
"""Each in a process of its own, with a detached model beside it: name of the process, and of its package."""
BY_HAND: Final = (HOOKS, HOOKS_BESIDE, HIDDEN, HIDDEN_BESIDE)
PEERS: Final = (*BY_HAND, *LIBRARIES)
SHORT: Final = 4
LONG: Final = 36
"""Taps of the two combs (`benchmarks/probe_micro.py`): three a layer of a model of twelve."""
