"""What ranks send each other, timed: from stage to stage, and sums over the ranks of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from insitu.vllm.hooks import NotThere, say, wrap
from insitu.vllm.place import Place

if TYPE_CHECKING:
    from insitu.session.live import Session


class Neighbours:
    """The groups of ranks that one worker speaks in. now: returns (step id, slot)."""

    def __init__(self, session: Session, place: Place, now: Callable[[], tuple[int, int]]) -> None:
        self._session, self._place, self._now = session, place, now

    def install(self) -> None:
        from vllm.distributed import parallel_state

        pipeline, tensor = parallel_state.get_pp_group(), parallel_state.get_tp_group()
        if pipeline.world_size > 1:
            # Over shared memory both are done when they return; a send waits until the peer has taken the last one.
            self._is_blocking = bool(getattr(pipeline, "use_cpu_custom_send_recv", False))
            self._try("waits for the stage before", pipeline, "irecv_tensor_dict", (), self._around_receive)
            self._try("sends to the next stage", pipeline, "isend_tensor_dict", ("tensor_dict",), self._around_send)
        if tensor.world_size > 1 and str(tensor.device) == "cpu":  # on a device the host only launches it
            self._try("waits for other ranks of the stage", tensor, "_all_reduce_out_place", (), self._around_sum)

    def _try(self, lost: str, group: Any, name: str, parameters: tuple[str, ...], around: Any) -> None:
        try:
            wrap(group, name, parameters, around)
        except NotThere as error:
            say("rank %d: %s not observed: %s", self._place.rank, lost, error)

    def _interval(self, cls: str, peer: int, tensors: Any = None) -> Any:
        step_id, mb = self._now()
        return self._session.interval(cls, step_id=step_id, mb=mb, peer=peer, num_bytes=bytes_of(tensors))

    def _around_receive(self, receive: Callable[..., Any]) -> Callable[..., Any]:
        def irecv_tensor_dict(*args: Any, **kwargs: Any) -> Any:
            with self._interval("recv_wait", self._place.previous) as wait:
                tensors, handles, after = receive(*args, **kwargs)
                wait.num_bytes = bytes_of(tensors) if self._is_blocking else 0
            return tensors, [Timed(each, self._receiving) for each in handles], after

        return irecv_tensor_dict

    def _around_send(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def isend_tensor_dict(tensor_dict: Any, *args: Any, **kwargs: Any) -> Any:
            with self._interval("send_wait" if self._is_blocking else "send_xfer", self._place.next, tensor_dict):
                handles = send(tensor_dict, *args, **kwargs)
            return [Timed(each, self._sending) for each in handles]

        return isend_tensor_dict

    def _receiving(self) -> Any:
        return self._interval("recv_wait", self._place.previous)

    def _sending(self) -> Any:
        return self._interval("send_wait", self._place.next)

    def _around_sum(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def all_reduce_out_place(x: Any, *args: Any, **kwargs: Any) -> Any:
            with self._interval("collective_wait", -1, {"": x}):
                return reduce(x, *args, **kwargs)

        return all_reduce_out_place


class Timed:
    """A handle of something under way, whose `wait` is timed; anything else is the handle's own."""

    def __init__(self, handle: Any, waiting: Callable[[], Any]) -> None:
        self._handle, self._waiting = handle, waiting

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._waiting():
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def bytes_of(tensors: Mapping[str, Any] | None) -> int:
    """Return how large the tensors of a dictionary are, in bytes."""
    return sum(int(getattr(each, "nbytes", 0)) for each in (tensors or {}).values())
