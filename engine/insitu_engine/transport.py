"""Hidden states from stage to stage: torch.distributed over gloo, behind one small class."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from insitu.identity import boot_id
from insitu_engine.errors import PeerLost

HEADER_LENGTH: Final = 8
SEND_NS: Final = 3
"""Place in a header of when the sender handed the step on; before it stand step id, slot and rows."""
_TAGS: Final = 1 << 30


class Receipt:
    """A posted receive of one step: first its header, then its hidden states."""

    def __init__(
        self, header: torch.Tensor, hidden: torch.Tensor, works: tuple[Any, Any], peer: int, *, one_clock: bool
    ) -> None:
        self._header = header
        self._hidden = hidden
        self._works = works
        self._peer = peer
        self._one_clock = one_clock

    @property
    def num_bytes(self) -> int:
        return self._hidden.nbytes

    def wait_header(self, step_id: int) -> int | None:
        """Wait for the header; return the sender's `send_ns`, None when it is of another clock. Raises PeerLost."""
        _wait(self._works[0], self._peer)
        header: list[int] = self._header.tolist()
        assert header[0] == step_id, f"step {header[0]} arrived where step {step_id} was due"
        return header[SEND_NS] if self._one_clock else None

    def wait_hidden(self) -> torch.Tensor:
        """Wait for the hidden states [num_rows, hidden], in host memory. Raises PeerLost."""
        _wait(self._works[1], self._peer)
        return self._hidden


class Transport:
    """The neighbours of one stage. Sends are asynchronous; what they hold is kept until they are done."""

    def __init__(self, rank: int, num_ranks: int, store: Path, hidden_size: int, dtype: torch.dtype) -> None:
        self.rank = rank
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._sending: list[tuple[Any, torch.Tensor]] = []
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(days=1),
        )
        boots = [""] * num_ranks
        dist.all_gather_object(boots, boot_id())
        self._one_clock = boots[rank] == boots[rank - 1]
        """Whether the stage before counts time as this one does: whether they run under one kernel."""

    def post_receive(self, step_id: int, num_rows: int) -> Receipt:
        """Post the receive of a step from the stage before; its shape is known from the plan."""
        header = torch.empty(HEADER_LENGTH, dtype=torch.int64)
        hidden = torch.empty((num_rows, self._hidden_size), dtype=self._dtype)
        peer, tag = self.rank - 1, _tag(step_id)
        works = _post(lambda: (dist.irecv(header, peer, tag=tag), dist.irecv(hidden, peer, tag=tag + 1)), peer)
        return Receipt(header, hidden, works, peer, one_clock=self._one_clock)

    @property
    def send_pending(self) -> bool:
        """True while an earlier send has not been taken by the peer."""
        return bool(self._sending) and not all(work.is_completed() for work, _ in self._sending)

    def wait_sent(self) -> None:
        """Wait until the peer has taken every earlier send. Raises PeerLost."""
        for work, _ in self._sending:
            _wait(work, self.rank + 1)
        self._sending.clear()

    def send(self, step_id: int, mb: int, hidden: torch.Tensor, send_ns: int) -> None:
        """Hand hidden states [num_rows, hidden] to the next stage; returns at once. Raises PeerLost."""
        payload = hidden.cpu().contiguous()
        header = torch.tensor([step_id, mb, hidden.shape[0], send_ns, 0, 0, 0, 0])
        peer, tag = self.rank + 1, _tag(step_id)
        works = _post(lambda: (dist.isend(header, peer, tag=tag), dist.isend(payload, peer, tag=tag + 1)), peer)
        self._sending += zip(works, (header, payload), strict=True)

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


def _tag(step_id: int) -> int:
    return 2 * step_id % _TAGS


def _post(post: Callable[[], tuple[Any, Any]], peer: int) -> tuple[Any, Any]:
    try:
        return post()
    except RuntimeError as error:
        raise PeerLost(f"rank {peer} is gone: {error}") from None


def _wait(work: Any, peer: int) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise PeerLost(f"rank {peer} is gone: {error}") from None
