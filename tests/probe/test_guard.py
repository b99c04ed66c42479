"""What an error of the probe is told as where it stops: its class only where the message does not say it all."""

from __future__ import annotations

import pytest

from insitu.config import ConfigError
from insitu.guard import Guard


@pytest.mark.usefixtures("insitu_contains")
@pytest.mark.parametrize(("part", "are_several", "are"), [("part", False, "is"), ("parts", True, "are")])
def test_of_several_parts_it_is_said_in_the_plural(
    part: str, are_several: bool, are: str, caplog: pytest.LogCaptureFixture
) -> None:
    Guard(part, "the rest goes on", are_several=are_several).contain(KeyError(1))
    assert caplog.messages == [f"insitu: the {part} failed and {are} switched off; the rest goes on (KeyError: 1)"]


@pytest.mark.usefixtures("insitu_contains")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("INSITU_T0: 'x' is not known"), "INSITU_T0: 'x' is not known"),
        (ConfigError(), "ConfigError: "),
        (LookupError("no\nsuch"), "LookupError: no such"),
    ],
)
def test_the_first_error_is_one_line_and_names_the_class_of_what_is_not_ours(
    error: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    guard = Guard("part", "the rest goes on", goes_on=True)
    for _ in range(2):
        guard.contain(error)
    assert caplog.messages == [f"insitu: the part failed; the rest goes on ({said})"]
    assert guard.num_errors == 2
