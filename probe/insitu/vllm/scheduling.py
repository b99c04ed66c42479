"""vLLM's scheduler observed: the lives of requests, what a decision takes, and a stamp on each step for the ranks."""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import insitu
from insitu.identity import boot_id
from insitu.vllm.asked import asked_of
from insitu.vllm.ending import Ending
from insitu.vllm.hooks import OF_SCHEDULER, contain_start, guard, say
from insitu.vllm.place import replica_of
from insitu.vllm.stamp import Stamp, put, stamp_of
from insitu.vocabulary import Role

if TYPE_CHECKING:
    from insitu.session.live import Session

FAILED: Final = ("ERROR", "REPETITION")
"""Reasons of vLLM's for the end of a request that nobody asked for."""


class Dispatch:
    """What one scheduler says through its session. Called on the engine's thread, inside of `contained`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.ending = Ending(session)
        self._clock = boot_id()
        self._next_step = 0
        self._busy: set[int] = set()
        """Slots of the steps in flight."""
        self._demand_since_ns = self._ready_ns = 0
        self._num_tokens: dict[str, int] = {}
        self._is_wrong_said = False
        """Whether somebody was told of a request that asks for what there is not."""

    @classmethod
    def start(cls, scheduler: Any) -> Dispatch:
        """Start the session of the process that schedules."""
        config = scheduler.vllm_config
        replica = replica_of(config.parallel_config)
        model = str(config.model_config.model)
        session = insitu.start(role=Role.DRIVER, model=model, replica=replica, dp_rank=replica)
        cache = config.cache_config
        session.event("kv_pool", f"{cache.num_gpu_blocks} blocks of {cache.block_size} token positions")
        return cls(session)

    def deciding(self) -> Any:
        """Return the interval of a decision."""
        return self._session.interval("schedule")

    def arrived(self, request: Any, is_first: bool) -> None:
        """A request came. is_first: nobody else is there."""
        now = time.monotonic_ns()
        if is_first:
            self._demand_since_ns = now
        self._ready_ns = max(self._ready_ns, now)
        name, asked = request.request_id, asked_of(request.sampling_params, request.trace_headers)
        if asked.wrong is not None and not self._is_wrong_said:
            self._is_wrong_said = True
            say("%s; rows of such requests are not taken", asked.wrong)
        self._num_tokens[name] = 0
        self._session.request("arrived", name, num_tokens=request.num_prompt_tokens, trace=asked.trace, t_ns=now)
        self._session.request("queued", name, t_ns=now)

    def scheduled(self, output: Any) -> None:
        """A step was decided on: stamp it."""
        now = time.monotonic_ns()
        if not output.total_num_scheduled_tokens:
            return
        step_id, self._next_step = self._next_step, self._next_step + 1
        mb = next(slot for slot in range(len(self._busy) + 1) if slot not in self._busy)
        self._busy.add(mb)
        put(output, Stamp(step_id, mb, self._demand_since_ns, self._ready_ns, now, self._clock))
        for new in output.scheduled_new_reqs:
            self._session.request("scheduled", new.req_id, step_id=step_id, t_ns=now)
            if new.num_computed_tokens:
                text = f"{new.req_id}: positions 0 to {new.num_computed_tokens - 1} came from the prefix cache"
                self._session.event("prefix_cached", text, step_id=step_id)
        for name in output.scheduled_cached_reqs.resumed_req_ids:
            self._session.request("resumed", name, step_id=step_id, t_ns=now)

    def came_back(self, output: Any) -> None:
        """A step's answer is there."""
        self._ready_ns = time.monotonic_ns()
        stamp = stamp_of(output)
        if stamp is not None:
            self._busy.discard(stamp.mb)

    def answered(self, output: Any, answers: Any) -> None:
        """Tokens of a step were given to their requests."""
        stamp, now = stamp_of(output), self._ready_ns
        step_id = -1 if stamp is None else stamp.step_id
        for answer in (each for group in answers.values() for each in group.outputs):
            name, new = answer.request_id, len(answer.new_token_ids)
            before = self._num_tokens.get(name, 0)
            self._num_tokens[name] = before + new
            if new:
                event = "token" if before else "first_token"
                self._session.request(event, name, step_id=step_id, num_tokens=before + new, t_ns=now)
            if answer.finish_reason is not None:
                self._end(name, "failed" if answer.finish_reason.name in FAILED else "finished", step_id)

    def preempted(self, request: Any) -> None:
        self._session.request("preempted", request.request_id, num_tokens=self._num_tokens.get(request.request_id))

    def dropped(self, requests: Any) -> None:
        """Requests were taken back: their client left, or a stop text was read. vLLM does not say which."""
        for request in requests:
            self._end(getattr(request, "request_id", request), "finished", -1)

    def _end(self, name: str, event: str, step_id: int) -> None:
        num_tokens = self._num_tokens.pop(name, None)
        if num_tokens is not None:
            self._session.request(event, name, step_id=step_id, num_tokens=num_tokens)


@cache
def observed(scheduler: Any) -> Any:
    """Return a scheduler class as it is, observed. Its errors stop here; the scheduler's own go on."""

    class Observed(scheduler):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.insitu: Dispatch | None = None
            try:
                self.insitu = Dispatch.start(self)
            except Exception as error:
                contain_start(error, OF_SCHEDULER)

        def _tell(self, what: str, *told: Any) -> None:
            if self.insitu is not None:
                try:
                    getattr(self.insitu, what)(*told)
                except Exception as error:
                    guard.contain(error)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            if self.insitu is None:
                return super().schedule(*args, **kwargs)
            with self.insitu.deciding():
                output = super().schedule(*args, **kwargs)
            self._tell("scheduled", output)
            return output

        def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._tell("came_back", scheduler_output)
            answers = super().update_from_output(scheduler_output, *args, **kwargs)
            self._tell("answered", scheduler_output, answers)
            return answers

        def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            is_first = not self.has_unfinished_requests()
            is_new = request.request_id not in self.requests
            answer = super().add_request(request, *args, **kwargs)
            if is_new:
                self._tell("arrived", request, is_first)
            return answer

        def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
            dropped = super().finish_requests(*args, **kwargs)
            self._tell("dropped", dropped or ())
            return dropped

        def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            answer = super()._preempt_request(request, *args, **kwargs)
            self._tell("preempted", request)
            return answer

    Observed.__name__, Observed.__qualname__ = scheduler.__name__, scheduler.__qualname__
    Observed.__module__ = scheduler.__module__
    return Observed
