"""What a rank of vLLM says of rows that nobody can ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from insitu.vllm.observing import observe, rows_not_taken
from insitu.vllm.place import Place
from insitu.vllm.sites import Stage, whole_catalogue

FIRST = Stage("model", (0, 1), 4)
NONE = "INSITU_VLLM_ROWS: no site matches"


@pytest.mark.parametrize(
    ("globs", "said"),
    [
        (["L*.resid_post", "logits", "L3.mlp_in"], []),
        (
            ["Z*.foo", "L*.resid_post"],
            [
                f"rows of requests at Z*.foo not observed: {NONE} 'Z*.foo'; "
                "the nearest are embed, L0.attn_in, L0.attn_out"
            ],
        ),
        (
            ["L*.resid_pots"],
            [
                f"rows of requests not observed: {NONE} 'L*.resid_pots'; "
                "the nearest are L*.resid_post, L*.resid_mid, L*.mlp_out"
            ],
        ),
        (
            ["logits", "L[3-1].mlp_out"],
            [
                "rows of requests at L[3-1].mlp_out not observed: INSITU_VLLM_ROWS: sites='L[3-1].mlp_out': the range "
                "[3-1] is empty; write the smaller number first"
            ],
        ),
        ([], ["rows of requests not observed: INSITU_VLLM_ROWS names no site"]),
    ],
)
def test_only_of_sites_that_nobody_can_ask_for_it_is_said_with_the_nearest(
    globs: Sequence[str], said: Sequence[str]
) -> None:
    assert [str(limit) for limit in rows_not_taken(globs, whole_catalogue(FIRST), nobody_asked=False)] == said


def test_a_rank_that_is_switched_off_in_the_file_puts_no_taps_into_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "insitu.toml").write_text("disabled = true\n")
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=model), model_config=SimpleNamespace(model="m"))
    place = Place(0, 0, tp_rank=0, pp_rank=0, ep_rank=0, num_stages=1, previous=0, next=0, last_stage=0)
    session, graph, limits = observe(worker, place, [])
    session.close()
    assert (graph, limits) == (None, [])
    assert not session.sites() and not model._forward_hooks and list(tmp_path.iterdir()) == [tmp_path / "insitu.toml"]
