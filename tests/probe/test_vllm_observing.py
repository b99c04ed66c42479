"""What a rank of vLLM says of rows that nobody can ask for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from insitu.vllm.observing import rows_not_taken

NAMES = ("L0.resid_post", "L1.resid_post", "logits")


@pytest.mark.parametrize(
    ("globs", "said"),
    [
        (["L*.resid_post", "logits"], []),
        (
            ["Z*.foo", "L*.resid_post"],
            ["rows of requests at Z*.foo not observed: INSITU_VLLM_ROWS: no site of this model matches 'Z*.foo'"],
        ),
        (["Z*.foo"], ["rows of requests not observed: INSITU_VLLM_ROWS: no site of this model matches 'Z*.foo'"]),
        ([], ["rows of requests not observed: INSITU_VLLM_ROWS names no site"]),
    ],
)
def test_only_of_sites_that_nobody_can_ask_for_it_is_said(globs: Sequence[str], said: Sequence[str]) -> None:
    assert [str(limit) for limit in rows_not_taken(globs, NAMES, nobody_asked=False)] == said
