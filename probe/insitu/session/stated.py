"""What somebody else says of a step that nobody opened: whose rows a forward computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from insitu.session.row_map import Rows


class Stated(NamedTuple):
    """Arguments of a step, as whoever follows the model's calls knows them."""

    rows: Sequence[Rows] | None = None
    num_padded: int = 0
    has_all_logits: bool = False
    """Whether each token row has a row of logits: then that has the same number, and belongs to the same request."""


NOTHING: Final = Stated()
