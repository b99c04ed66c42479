"""A rank of vLLM watched: where its thread's time goes, which step it runs, and whose rows those are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from insitu.identity import boot_id
from insitu.session.intervals import CLASS_NUMBERS
from insitu.vllm.asked import Asked, asked_of
from insitu.vllm.ending import Ending
from insitu.vllm.hooks import NotThere, guard, say, stranger, wrap
from insitu.vllm.links import Neighbours
from insitu.vllm.observing import observe
from insitu.vllm.place import Place, place_of
from insitu.vllm.rows import row_map
from insitu.vllm.stamp import Stamp, stamp_of
from insitu.vllm.versions import ROWS_TOO, Limit, limits_of, refused_runner

if TYPE_CHECKING:
    from insitu.session.intervals import Interval
    from insitu.session.live import Session
    from insitu.session.open_step import Step
    from insitu.session.row_map import Rows
    from insitu.vllm.compiled import OneGraph

DRIVER: Final = -1
"""`peer` of the process that schedules."""


def watch(worker: Any, other: str | None) -> None:
    """Observe a worker whose model has just been loaded, and is not compiled yet. other: who else wraps its loading."""
    runner = worker.model_runner
    if (refused := refused_runner(runner)) is not None:
        say("%s", refused)
        return
    limits = list(limits_of(worker.vllm_config))
    others = [other, *(stranger(runner, name) for name in ("_model_forward", "execute_model"))]
    if found := next(filter(None, others), None):
        limits.append(Limit(ROWS_TOO, f"{found} holds on to vLLM's runner as well, and may change what it computes"))
    place = place_of(worker)
    has_rows = not limits
    session, graph, limits = observe(worker, place, limits)
    for limit in limits:
        tell_limit(session, place, limit)
    RankWatch(worker, session, place, graph, has_rows=has_rows).install()


def tell_limit(session: Session, place: Place, limit: Limit) -> None:
    """Say what is not observed of a rank, once a stage, and in the store for each."""
    if place.tp_rank == 0:
        say("rank %d: %s", place.rank, limit)
    session.event("not_observed", str(limit))


class RankWatch:
    """One outer `host` interval holds all of the rank's time; what waits, computes or sends opens inner ones."""

    def __init__(self, worker: Any, session: Session, place: Place, graph: OneGraph | None, *, has_rows: bool) -> None:
        self._worker, self._runner, self._session, self._place = worker, worker.model_runner, session, place
        self._graph, self._has_rows = graph, has_rows
        self._ending = Ending(session)
        self._is_last = place.is_last
        self._clock = boot_id()
        self._ids_from = place.last_stage if place.is_first and not place.is_last else DRIVER
        """Whom a wait for the next step waits for: the first stage waits for the tokens that the last one samples."""
        self._host: Interval | None = None
        self._wait: Interval | None = None
        self._step: Step | None = None
        self._step_id = self._mb = -1
        self._next_step = 0
        self._asked: dict[str, Asked] = {}
        self._neighbours = Neighbours(session, place, lambda: (self._step_id, self._mb))

    def install(self) -> None:
        """Put this in front of what the worker runs."""
        worker, runner = self._worker, self._runner
        self._host = self._session.interval("host").__enter__()
        for owner, name, parameters, around, lost in (
            (worker, "determine_available_memory", (), self._around_warm_up, "warm-up"),
            (worker, "compile_or_warm_up_model", (), self._around_warm_up, "warm-up"),
            (worker, "execute_model", ("scheduler_output",), self._around_execute, "waits between steps"),
            (worker, "sample_tokens", ("grammar_output",), self._around_sample, "sampling"),
            (worker, "shutdown", (), self._around_shutdown, "the last second"),
            (runner, "_model_forward", ("positions",), self._around_forward, "steps"),
            (runner.model, "compute_logits", (), self._around_logits, "logits"),
        ):
            if name == "compute_logits" and not self._is_last:
                continue
            try:
                wrap(owner, name, parameters, around)
            except NotThere as error:
                tell_limit(self._session, self._place, Limit(lost, str(error)))
        self._neighbours.install()

    # -- what is put in front of vLLM's methods ------------------------------------------------------------------

    def _around_warm_up(self, warm_up: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._tell(self._end_wait)
            try:
                with self._session.interval("compile"):
                    return warm_up(*args, **kwargs)
            finally:
                self._tell(self._wait_for, "idle", DRIVER)

        return watched

    def _around_execute(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._tell(self._begin, scheduler_output)
            try:
                return execute(scheduler_output, *args, **kwargs)
            finally:
                self._tell(self._executed, scheduler_output)

        return execute_model

    def _around_sample(self, sample: Callable[..., Any]) -> Callable[..., Any]:
        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            self._tell(self._end_wait)
            try:
                with self._session.interval("sample" if self._is_last else "host", step_id=self._step_id, mb=self._mb):
                    return sample(*args, **kwargs)
            finally:
                self._tell(self._wait_for, "recv_wait", self._ids_from)

        return sample_tokens

    def _around_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def model_forward(*args: Any, **kwargs: Any) -> Any:
            self._tell(self._open_step, kwargs.get("positions"))
            try:
                with self._session.interval("compute", step_id=self._step_id, mb=self._mb):
                    return forward(*args, **kwargs)
            finally:
                if not self._is_last:
                    self._tell(self._close_step)

        return model_forward

    def _around_logits(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            if self._step is None:
                return compute(*args, **kwargs)
            try:
                with self._session.interval("compute", step_id=self._step_id, mb=self._mb):
                    return compute(*args, **kwargs)
            finally:
                self._tell(self._close_step)

        return compute_logits

    def _around_shutdown(self, shutdown: Callable[..., Any]) -> Callable[..., Any]:
        def close_and_shut_down(*args: Any, **kwargs: Any) -> Any:
            self._tell(self._leave)
            return shutdown(*args, **kwargs)

        return close_and_shut_down

    def _tell(self, what: Callable[..., None], *told: Any) -> None:
        try:
            what(*told)
        except Exception as error:
            guard.contain(error)

    # -- the rank's time -----------------------------------------------------------------------------------------

    def _wait_for(self, cls: str, peer: int, step_id: int = -1, mb: int = -1) -> None:
        """The worker goes back to its queue."""
        self._end_wait()
        self._wait = self._session.interval(cls, step_id=step_id, mb=mb, peer=peer).__enter__()

    def _end_wait(self) -> None:
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait.__exit__(None, None, None)

    def _begin(self, output: Any) -> None:
        """A step came out of the queue."""
        self._note_requests(output)
        if not output.total_num_scheduled_tokens:
            self._end_wait()
            return
        stamp = stamp_of(output)
        self._step_id, self._mb = (self._next_step, 0) if stamp is None else (stamp.step_id, stamp.mb)
        self._next_step = self._step_id + 1
        if self._wait is not None:
            if stamp is not None and stamp.clock == self._clock:
                self._attribute(self._wait, stamp)
            self._wait.step_id, self._wait.mb = self._step_id, self._mb
        self._end_wait()
        if self._host is not None:
            self._host.step_id, self._host.mb = self._step_id, self._mb

    def _attribute(self, wait: Interval, stamp: Stamp) -> None:
        """Say what the wait that just ended was for, by the times that the scheduler put on the step."""
        if stamp.demand_since_ns > wait.t0_ns:
            wait.cls, wait.peer = CLASS_NUMBERS["idle"], DRIVER
            wait.turn("recv_wait", stamp.demand_since_ns, peer=self._ids_from)
        wait.step_id, wait.mb = stamp.step_id, stamp.mb
        if self._ids_from != DRIVER:
            wait.turn("recv_wait", stamp.ready_ns, peer=DRIVER)
        wait.turn("recv_xfer", stamp.send_ns, peer=DRIVER)

    def _executed(self, output: Any) -> None:
        self._close_step()
        if output.total_num_scheduled_tokens:
            self._wait_for("recv_wait", DRIVER, self._step_id, self._mb)
        else:  # it says that requests are over; where others go on, the next step's stamp says so
            self._wait_for("idle", DRIVER)

    def _leave(self) -> None:
        self._end_wait()
        if self._host is not None:
            self._host.__exit__(None, None, None)
        self._ending.close()

    # -- the step ------------------------------------------------------------------------------------------------

    def _note_requests(self, output: Any) -> None:
        """Remember what requests ask, which vLLM tells a worker once; forget those that ended."""
        for name in output.finished_req_ids:
            self._asked.pop(name, None)
        for new in output.scheduled_new_reqs:
            asked = asked_of(new.sampling_params)
            if asked.capture or asked.trace is not None:
                self._asked[new.req_id] = asked

    def _open_step(self, positions: Any) -> None:
        rows = self._row_map() if self._has_rows else None
        num_rows = None if rows is None else sum(entry.count for entry in rows)
        num_padded = 0 if positions is None or num_rows is None else max(0, int(positions.shape[-1]) - num_rows)
        step = self._session.step(self._step_id, mb=self._mb, rows=rows, num_rows=num_rows, num_padded=num_padded)
        self._step = step.__enter__()
        if self._graph is not None and step.is_observed:
            self._graph.begin()

    def _row_map(self) -> Sequence[Rows]:
        """Read whose rows come: after vLLM has prepared its inputs, which may reorder the requests."""
        runner = self._runner
        batch = runner.input_batch
        names = batch.req_ids
        n = len(names)
        starts = runner.query_start_loc.np[: n + 1].tolist()
        computed, prompts = batch.num_computed_tokens_cpu[:n].tolist(), batch.num_prompt_tokens[:n].tolist()
        return row_map(names, starts, computed, prompts, self._asked)

    def _close_step(self) -> None:
        if self._step is not None:
            step, self._step = self._step, None
            if self._graph is not None:
                self._graph.end()
            step.__exit__(None, None, None)
