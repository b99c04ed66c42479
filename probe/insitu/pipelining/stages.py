"""Follows one stage: which micro-batch a forward is, and how long it waited for what the stage before sends.

A schedule asks its stage what to receive, waits for that, and calls the stage's forward: the time between the first and
the last is the wait. Nothing of a schedule is touched, and what training does backwards is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from torch import distributed, nn

if TYPE_CHECKING:
    from insitu.session.intervals import Interval
    from insitu.session.live import Session

_BASE: Final = "_PipelineStageBase"
_ASKED: Final = ("get_fwd_recv_ops", "forward_one_chunk", "get_fwd_send_ops")
"""What a schedule calls of a stage for each micro-batch, which is its first argument."""


@dataclass(frozen=True)
class StageOf:
    """A stage, as attaching needs it."""

    stage: Any
    module: nn.Module

    @property
    def place(self) -> Mapping[str, int]:
        """Fields of `Source`: its rank among all, its stage, and its rank in its pipeline."""
        rank = distributed.get_rank()
        return {"rank": rank, "stage": int(self.stage.stage_index), "pp_rank": int(self.stage.group_rank)}

    def follow(self, session: Session) -> Callable[[], None]:
        """Let each micro-batch be a step of the session's; return the undo."""
        return Follower(session, self.stage).follow()


def stage_of(model: Any) -> StageOf | None:
    """Return the stage that this is, None for anything else. Raises ValueError for one that is not as it is known."""
    if not any(base.__name__ == _BASE for base in type(model).__mro__):
        return None
    module = getattr(model, "submod", None)
    if not isinstance(module, nn.Module) or not all(callable(getattr(model, name, None)) for name in _ASKED):
        raise ValueError(f"this {type(model).__name__} is none that is known; attach to the module that it runs")
    return StageOf(model, module)


class Follower:
    """What is known of one stage's micro-batches."""

    def __init__(self, session: Session, stage: Any) -> None:
        self._session, self._stage = session, stage
        self._waiting: Interval | None = None
        self._is_alone = stage.num_stages == stage.group_size
        """Whether its rank has no other stage, for which it works while this one waits."""

    def follow(self) -> Callable[[], None]:
        """Put itself in front of the stage's methods; return the undo."""
        receive, forward = self._stage.get_fwd_recv_ops, self._stage.forward_one_chunk

        def get_fwd_recv_ops(fwd_chunk_id: int) -> Any:
            ops = receive(fwd_chunk_id)
            self._begin_to_wait(fwd_chunk_id, ops)
            return ops

        def forward_one_chunk(fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
            self._end_wait()
            with self._session.step(mb=fwd_chunk_id):
                return forward(fwd_chunk_id, *args, **kwargs)

        given = {"get_fwd_recv_ops": get_fwd_recv_ops, "forward_one_chunk": forward_one_chunk}
        vars(self._stage).update(given)

        def undo() -> None:
            self._end_wait()
            for name, function in given.items():
                if vars(self._stage).get(name) is function:  # else somebody else's is around it
                    del vars(self._stage)[name]

        return undo

    def _begin_to_wait(self, mb: int, ops: Any) -> None:
        """Time from now on what the stage waits for; one that asks ahead for several waits for the first of them."""
        if not ops or not self._is_alone or self._waiting is not None or self._session.is_closed:
            return
        num_bytes = sum(op.tensor.numel() * op.tensor.element_size() for op in ops)
        peer, step_id = int(ops[0].peer), self._session.next_step
        self._waiting = self._session.interval("recv_wait", step_id=step_id, mb=mb, peer=peer, num_bytes=num_bytes)
        self._waiting.__enter__()

    def _end_wait(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.__exit__(None, None, None)
