"""The driver's core without processes: ranks are played by the test, message by message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import insitu
from insitu.testing import Recording
from insitu.vocabulary import RequestEvent
from insitu_engine.api import Piece, pieces
from insitu_engine.driver import Driver, End, Ticket
from insitu_engine.errors import RequestError
from insitu_engine.messages import NOT_FINITE, Frames, Idle, Sampled, StepPlan, Stop, Traffic, to_rank
from insitu_engine.request import Request
from insitu_engine.scheduler import Limits


class Wire:
    """A rank's end of a link: keeps what was sent to it."""

    def __init__(self) -> None:
        self._frames = Frames(to_rank)
        self.received: list[Any] = []

    def write(self, data: bytes) -> None:
        self.received += self._frames.feed(data)

    def send(self, message: Any) -> None:
        from insitu_engine.messages import frame

        self.write(frame(message))

    def plans(self) -> list[StepPlan]:
        return [message for message in self.received if isinstance(message, StepPlan)]


class Setting:
    """A driver that believes it is ready, with a clock that counts its readings."""

    def __init__(self, session: insitu.Session, **limits: int) -> None:
        self.now_ns = 0
        bounds = Limits(**{"num_slots": 2, "num_blocks": 32, "max_batch": 2, "token_budget": 16, **limits})
        self.driver = Driver(bounds, session, clock=self.tick)
        self.wires = [Wire(), Wire()]
        self.driver.links = self.wires  # type: ignore[assignment]
        self.driver.status = "ready"

    def tick(self) -> int:
        self.now_ns += 1
        return self.now_ns

    def submit(self, name: str, prompt: int = 3, tokens: int = 2) -> Ticket:
        return self.driver.submit(Request(name=name, prompt=[1] * prompt, max_tokens=tokens))

    def answer(self, plan: StepPlan, token: int = 7) -> None:
        self.driver.on_message(1, Sampled(plan.step_id, plan.mb, [token] * plan.num_samples))


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test; the session it gets records in memory."""

    def run(insitu_records: Recording) -> None:
        session = insitu.start(to=insitu_records, role="driver")
        try:
            asyncio.run(test(session, insitu_records))
        finally:
            session.close()

    return run


def updates(ticket: Ticket) -> list[int | End]:
    found = []
    while not ticket.updates.empty():
        found.append(ticket.updates.get_nowait())
    return found


@on_a_loop
async def test_every_rank_gets_every_plan_with_its_times(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    at.submit("a")
    (plan,) = at.wires[0].plans()
    assert at.wires[1].plans() == [plan]
    assert plan.demand_since_ns == plan.ready_ns < plan.send_ns
    at.submit("b")
    second = at.wires[0].plans()[1]
    assert second.mb != plan.mb
    assert second.demand_since_ns == plan.demand_since_ns, "there was work already"
    before = at.now_ns
    at.answer(plan)
    third = at.wires[0].plans()[2]
    assert third.mb == plan.mb
    assert before < third.ready_ns < third.send_ns, "it waited for the sampled ids"


@on_a_loop
async def test_idle_is_told_when_the_last_request_ends(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    ticket = at.submit("a")
    for _ in range(2):
        at.answer(at.wires[0].plans()[-1])
    assert updates(ticket) == [7, 7, End("length")]
    idle = at.wires[0].received[-1]
    assert isinstance(idle, Idle) and idle.at_ns == at.now_ns
    at.submit("b")
    assert at.wires[0].plans()[-1].demand_since_ns > idle.at_ns
    assert at.driver.scheduler.pool.num_free != at.driver.scheduler.limits.num_blocks
    session.close()
    life = [RequestEvent(row["event"]).name for row in records.rows("requests", request="a")]
    assert life == ["ARRIVED", "SCHEDULED", "FIRST_TOKEN", "TOKEN", "FINISHED"]


@on_a_loop
async def test_a_full_queue_is_429_and_says_when_to_come_back(session: insitu.Session, records: Recording) -> None:
    at = Setting(session, num_slots=1, max_batch=1, max_queue=2)
    for name in "abc":
        at.submit(name)
    with pytest.raises(RequestError) as caught:
        at.submit("d")
    assert caught.value.status == 429
    assert caught.value.retry_after_s == 1
    session.close()
    assert [row["request"] for row in records.rows("requests", event=RequestEvent.QUEUED)] == ["b", "c"]


@on_a_loop
async def test_a_request_without_memory_says_since_when_and_for_how_much(
    session: insitu.Session, records: Recording
) -> None:
    at = Setting(session, num_slots=1, num_blocks=2)
    at.submit("a", prompt=20)
    at.submit("b", prompt=17, tokens=9)
    for _ in range(3):  # two steps for the prompt of "a", one for its last token
        at.answer(at.wires[0].plans()[-1])
    session.close()
    (waited,) = records.rows("requests", event=RequestEvent.KV_WAIT, request="b")
    (arrived,) = records.rows("requests", event=RequestEvent.ARRIVED, request="b")
    assert (waited["t_ns"], waited["num_tokens"], waited["step_id"]) == (arrived["t_ns"], 25, -1)
    life = [RequestEvent(row["event"]).name for row in records.rows("requests", request="b")]
    assert life == ["ARRIVED", "KV_WAIT", "QUEUED", "SCHEDULED"]


@on_a_loop
async def test_not_finite_ends_one_request_with_an_error(session: insitu.Session, records: Recording) -> None:
    at = Setting(session, num_slots=1)
    first, second = at.submit("a", tokens=3), at.submit("b", tokens=3)
    at.answer(at.wires[0].plans()[-1])
    plan = at.wires[0].plans()[-1]
    assert {row.request for row in plan.rows} == {"a", "b"}
    ids = [NOT_FINITE if row.request == "a" else 7 for row in plan.rows]
    at.driver.on_message(1, Sampled(plan.step_id, plan.mb, ids))
    end = updates(first)[-1]
    assert isinstance(end, End) and end.error is not None
    assert (end.error.status, end.error.code) == (500, "not_finite")
    assert not any(isinstance(update, End) for update in updates(second))
    assert at.wires[0].plans()[-1].scrub


@on_a_loop
async def test_a_failure_ends_everything_with_its_cause(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    tickets = [at.submit(name) for name in "ab"]
    at.driver.fail("rank 1 (stage 1) was killed by SIGKILL")
    at.driver.fail("rank 0 (stage 0) failed: rank 1 is gone")
    assert await at.driver.failed() == "rank 1 (stage 1) was killed by SIGKILL"
    for ticket in tickets:
        (end,) = updates(ticket)
        assert isinstance(end, End) and end.error is not None
        assert end.error.status == 503 and "SIGKILL" in str(end.error)
    with pytest.raises(RequestError, match="SIGKILL"):
        at.submit("c")


@pytest.mark.parametrize("status", ["loading", "draining"])
def test_nothing_is_taken_in_while_not_ready(status: str, insitu_records: Recording) -> None:
    @on_a_loop
    async def check(session: insitu.Session, records: Recording) -> None:
        at = Setting(session)
        at.driver.status = status
        with pytest.raises(RequestError) as caught:
            at.submit("a")
        assert caught.value.status == 503

    check(insitu_records)


@on_a_loop
async def test_draining_waits_for_the_last_one(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    at.submit("a", tokens=1)
    at.submit("b", tokens=1)
    waiting = asyncio.create_task(at.driver.drained())
    plans = at.wires[0].plans()
    at.answer(plans[0])
    await asyncio.sleep(0)
    assert not waiting.done()
    at.answer(plans[1])
    await asyncio.wait_for(waiting, 5)


@on_a_loop
async def test_an_abort_tells_why_and_frees_everything(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    ticket = at.submit("a")
    at.driver.abort_all("the server is stopping")
    (end,) = updates(ticket)
    assert isinstance(end, End) and "stopping" in str(end.error)
    at.answer(at.wires[0].plans()[0])
    assert at.driver.scheduler.pool.num_free == at.driver.scheduler.limits.num_blocks
    assert isinstance(at.wires[0].received[-1], Idle)


@on_a_loop
async def test_the_end_of_warm_up_is_told_to_ranks_and_store(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    at.submit("warmup-1", tokens=1)
    at.answer(at.wires[0].plans()[0])
    at.driver.end_warmup()
    assert at.wires[1].received[-1] == Traffic(1)
    at.driver.stop_ranks()
    assert at.wires[1].received[-1] == Stop()
    session.close()
    pool, event = records.rows("events")
    assert (pool["kind"], pool["text"]) == (
        "kv_pool",
        f"{at.driver.scheduler.limits.num_blocks} blocks of 16 token positions",
    )
    assert (event["kind"], event["step_id"]) == ("warmup_end", 0)


class Letters:
    """A tokenizer of one letter a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


@on_a_loop
async def test_a_stop_string_ends_the_output_and_its_request(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    ticket = at.submit("a", tokens=20)
    found: list[Piece] = []

    async def read() -> None:
        async for piece in pieces(at.driver, ticket, Letters(), ["xy"]):
            found.append(piece)

    reading = asyncio.create_task(read())
    for letter in "abxacxyz":
        at.answer(at.wires[0].plans()[-1], ord(letter))
        for _ in range(3):
            await asyncio.sleep(0)
        if reading.done():
            break
    await reading
    assert "".join(piece.text for piece in found) == "abxac"
    assert [piece.finish for piece in found][-1] == "stop"
    plan = at.wires[0].plans()[-1]
    if plan.step_id in {slot.step.step_id for slot in at.driver.scheduler.slots if slot.step}:
        at.answer(plan)
    assert not at.driver.scheduler.has_work
    session.close()
    assert RequestEvent(records.rows("requests", request="a")[-1]["event"]) == RequestEvent.FINISHED


@on_a_loop
async def test_whoever_stops_reading_cancels(session: insitu.Session, records: Recording) -> None:
    at = Setting(session)
    ticket = at.submit("a", tokens=20)
    stream = pieces(at.driver, ticket, None, [])
    at.answer(at.wires[0].plans()[-1])
    assert (await anext(stream)).ids == [7]
    await stream.aclose()  # type: ignore[attr-defined]
    at.answer(at.wires[0].plans()[-1])
    assert not at.driver.scheduler.has_work
    session.close()
    assert RequestEvent(records.rows("requests", request="a")[-1]["event"]) == RequestEvent.FAILED
