"""Rows 1, 2, 5 and 6 of the failure matrix, over a simulated disk: what was called durable is there, and once."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping

import pytest
from crash_kit import World
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from random_lives import CALLS, LIVES, MOMENTS, random_step

from insitu.segments import disk
from insitu.segments.expiry import SWEEP_S

pytestmark = pytest.mark.matrix

SOME_OR_MANY = pytest.mark.parametrize("num_seeds", [8, pytest.param(50, marks=pytest.mark.soak)])
"""Of the 20 places to die: 160 lives in every run, 1,000 in `make soak`."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Every fault is logged; thousands of them hide what failed."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def live(seed: int, lives: Mapping[str, int], kill_at: tuple[str, ...], power: bool | None = None) -> World:
    """Lead a random life of these chances, with deaths at these places; raises when something does not hold."""
    with pytest.MonkeyPatch.context() as patch:
        world, chance = World(seed, power), random.Random(seed)
        world.install(patch)
        for _ in range(50):
            random_step(world, chance, lives, kill_at)
            world.check()
        world.settle()
        world.check(at_end=True)
    return world


@SOME_OR_MANY
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_row_01_killed_at_every_step_it_keeps_what_was_durable_once(moment: str, call: str, num_seeds: int) -> None:
    label = f"{moment} {call}"
    lives = [live(seed, LIVES["kill"], (label,), power=False) for seed in range(num_seeds)]
    assert sum(world.died_at[label] for world in lives) > 0, "it never came there"


@SOME_OR_MANY
@pytest.mark.parametrize("call", ["write", "fdatasync", "rename", "fsync folder", "unlink"])
def test_row_02_a_power_loss_may_keep_any_part_of_what_was_not_synced(call: str, num_seeds: int) -> None:
    lives = [live(seed, LIVES["kill"], (f"before {call}", f"after {call}"), power=True) for seed in range(num_seeds)]
    assert sum(sum(world.died_at.values()) for world in lives) > 0, "it never came there"


@SOME_OR_MANY
def test_row_05_a_disk_that_is_full_at_any_write_takes_nothing_that_it_loses(num_seeds: int) -> None:
    lives = [live(seed, LIVES["full"], ("before write", "after write")) for seed in range(num_seeds)]
    assert sum(world.num_refused for world in lives) > 0


@SOME_OR_MANY
def test_row_06_an_error_of_any_call_loses_nothing_that_was_durable(num_seeds: int) -> None:
    lives = [live(seed, LIVES["error"], ("before fdatasync", "after write")) for seed in range(num_seeds)]
    assert sum(world.num_not_synced for world in lives) > 0


class Machine(RuleBasedStateMachine):
    """The same world in the hands of hypothesis, which shrinks what goes wrong to the steps that matter."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.world = World(seed)
        self.world.install(self.patch)

    @rule(which=st.integers(0, 3), num_rows=st.integers(1, 4))
    def send(self, which: int, num_rows: int) -> None:
        self.world.send(which, num_rows)

    @rule()
    def commit(self) -> None:
        self.world.commit()

    @rule(seconds=st.sampled_from([0.5, 2.0, 11.0, SWEEP_S]))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule()
    def be_away(self) -> None:
        self.world.be_away(SWEEP_S)

    @rule()
    def end(self) -> None:
        self.world.end()

    @rule()
    def poll(self) -> None:
        self.world.poll()

    @rule(moment=st.sampled_from(MOMENTS), call=st.sampled_from(CALLS), num_calls=st.integers(1, 20))
    def kill(self, moment: str, call: str, num_calls: int) -> None:
        self.world.kill_at(f"{moment} {call}", num_calls)

    @rule(call=st.sampled_from(CALLS), num_calls=st.integers(1, 5))
    def fail(self, call: str, num_calls: int) -> None:
        self.world.fail_at(f"before {call}", num_calls)

    @rule(num_bytes=st.integers(0, 200_000))
    def fill(self, num_bytes: int) -> None:
        self.world.fill(num_bytes)

    @rule()
    def make_room(self) -> None:
        self.world.make_room()

    @rule(power=st.booleans())
    def crash(self, power: bool) -> None:
        self.world.crash(power=power)

    @invariant()
    def what_was_durable_is_there_once(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        try:
            self.world.settle()
            self.world.check(at_end=True)
        finally:
            self.patch.undo()


@pytest.mark.parametrize("num_examples", [30, pytest.param(1000, marks=pytest.mark.soak)])
def test_no_sequence_of_faults_loses_doubles_or_revives_a_row(num_examples: int) -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=num_examples, stateful_step_count=40))


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
def test_a_sync_that_is_left_out_is_found(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof could fail: without either kind of sync it does."""

    def install(world: World, patch: pytest.MonkeyPatch) -> None:
        install_all(world, patch)
        patch.setattr(disk, call, lambda fd: None)

    install_all = World.install
    monkeypatch.setattr(World, "install", install)
    with pytest.raises(AssertionError):
        [live(seed, LIVES["kill"], ("after write",), power=True) for seed in range(50)]
