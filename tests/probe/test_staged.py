"""What is on its way to a device stays as it was sent, however many steps the host is ahead of it."""

from __future__ import annotations

import pytest
import torch

from insitu.slabs.rows import Destinations
from insitu.slabs.slab import NEVER, ControlBlock

HOST, NUM_SLABS = torch.device("cpu"), 40


class Busy:
    """A device that has not come to any copy yet."""

    def __init__(self) -> None:
        self.sources: list[torch.Tensor] = []

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking, "the host would wait"
        self.sources.append(source)


def test_the_control_block_of_each_step_in_flight_is_its_own() -> None:
    control, device = ControlBlock(HOST, NUM_SLABS), Busy()
    control.block = device  # type: ignore[assignment]
    for step in range(NUM_SLABS):
        control.write(1000 + step, step, step, step + 1, 1, 7)
        control.write(NEVER, NUM_SLABS, 0, 0, 0, 0)  # a replay outside of a step writes to the trash
    told = [source.tolist()[:6] for source in device.sources]
    assert told[::2] == [[1000 + step, step, step, step + 1, 1, 7] for step in range(NUM_SLABS)]
    assert told[1::2] == [[NEVER, NUM_SLABS, 0, 0, 0, 0]] * NUM_SLABS


def test_the_destinations_of_each_step_in_flight_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    destinations, device = Destinations(HOST, 2, 4, NUM_SLABS), Busy()
    monkeypatch.setattr(destinations, "_dest", device)
    for slab in range(NUM_SLABS):
        destinations.aim([[slab % 4], [3, slab % 3]], slab)
        destinations.aim([(), ()])  # a full graph in a step without rows
    told = [source.tolist() for source in device.sources]
    for slab in range(NUM_SLABS):
        first, second = [4, 4, 4, 4], [4, 4, 4, 0]
        first[slab % 4], second[slab % 3] = 0, 1
        assert told[2 * slab] == [first, second]
        assert told[2 * slab + 1] == [[4] * 4] * 2
