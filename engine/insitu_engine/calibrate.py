"""Warm-up: real requests over the shapes a server sees, before it says that it is ready.

They take the normal path through every rank, under names that begin with `warmup-`, so the judge can fit how long a
healthy stage takes for a step of a given shape before any traffic comes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from insitu_engine.driver import Driver, End
from insitu_engine.errors import EngineError
from insitu_engine.request import Request
from insitu_engine.scheduler import Limits

PREFIX = "warmup-"


def waves(limits: Limits, max_len: int, vocab_size: int) -> Iterator[list[Request]]:
    """Yield groups of requests to run one group after another.

    First prompts alone, from a full token budget down to a few rows; then full slots whose requests end one by one,
    so that every number of decoding rows from `max_batch` to 1 is seen at mixed context lengths.
    """
    slots, budget = limits.num_slots, limits.token_budget
    number = 0

    def request(length: int, max_tokens: int) -> Request:
        nonlocal number
        number += 1
        length = max(1, min(length, max_len - max_tokens, limits.num_blocks * 16 - max_tokens))
        prompt = [(7 * number + 3 * at) % vocab_size for at in range(length)]
        return Request(name=f"{PREFIX}{number}", prompt=prompt, max_tokens=max_tokens)

    for length in (budget, budget // 2, budget // 4, budget // 8, 4):
        yield [request(length, 2) for _ in range(slots)]
    batch = min(limits.max_batch, max_len // 2)
    yield [request(4 + 20 * (at % 4), 1 + at) for at in range(batch) for _ in range(slots)]


async def warm_up(driver: Driver, max_len: int, vocab_size: int) -> int:
    """Run all waves; return the number of steps they took. Raises EngineError when a request does not finish."""
    first = driver.scheduler.next_step
    for wave in waves(driver.scheduler.limits, max_len, vocab_size):
        queue = driver.scheduler.limits.max_queue
        for begin in range(0, len(wave), queue):
            tickets = [driver.submit(request) for request in wave[begin : begin + queue]]
            for end in await asyncio.gather(*(_end_of(ticket.updates) for ticket in tickets)):
                if end.error is not None:
                    raise EngineError(f"warm-up failed: {end.error}")
    return driver.scheduler.next_step - first


async def _end_of(updates: asyncio.Queue[int | End]) -> End:
    while True:
        update = await updates.get()
        if isinstance(update, End):
            return update
