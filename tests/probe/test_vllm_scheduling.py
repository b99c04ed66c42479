"""What vLLM's scheduler is told of requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import insitu
from insitu.testing import Recording
from insitu.vllm.scheduling import Dispatch


def test_a_word_that_there_is_not_is_told_once_and_the_request_is_recorded(
    insitu_records: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    params = SimpleNamespace(extra_args={"insitu": "capture=row"})
    with insitu.start(to=insitu_records, role="driver") as session:
        dispatch = Dispatch(session)
        for name in ("a", "b"):
            request = SimpleNamespace(request_id=name, sampling_params=params, trace_headers=None, num_prompt_tokens=3)
            dispatch.arrived(request, is_first=True)
    assert caplog.messages == [
        "insitu: capture=row is not known; it may be capture=rows; rows of such requests are not taken"
    ]
    assert {row["request"] for row in insitu_records.rows("requests")} == {"a", "b"}
