"""The table in docs/integrations.md says what these runs showed, to the letter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_cases import Run, Shared, refused_runner
from vllm_served import Served
from vllm_table import differs, seen


def test_the_page_shows_what_these_runs_showed(
    vllm_python: str, eager: Run, compiled: Run, shards: Shared, served: Served, refused: Mapping[str, Run]
) -> None:
    def of(run: Run) -> list[str]:
        return seen(run.store)

    nothing: list[Any] = ["no", "no", "no", "no"]
    rows = [
        ["one rank, eager", *of(eager)],
        ["two ranks of a stage (TP), eager", *of(shards.run)],
        ["one rank, compiled", *of(refused["graph"])],
        ["two stages (PP), compiled, `INSITU_VLLM_ROWS=L*.resid_post,logits`", *of(compiled)],
        ["its server, two stages, compiled, `INSITU_VLLM_ROWS=L*.resid_post`", *seen(served.store)],
        ["speculative decoding", *of(refused["speculative"])],
        ["a model whose sites nobody verified (OPT), eager", *of(refused["unknown-model"])],
        ["another plug-in on the runner", *of(refused["other-plugin"])],
        ["a runner of the second generation", *nothing, refused_runner(vllm_python)],
        ["another version", *nothing, refused["unknown-version"].said()[0]],
    ]
    assert not (wanted := differs("what tests/vllm saw", rows)), wanted
