"""How names of vLLM are held on to; and that nothing happens unless it is asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from insitu.vllm import installing
from insitu.vllm.hooks import NotThere, stranger, wrap
from insitu.vllm.scheduling import observed


class Owner:
    """Stands for a class of vLLM."""

    def work(self, given: int) -> int:
        return given + 1


Owner.__module__ = "vllm.somewhere"


def doubled(inner: Callable[..., Any]) -> Callable[..., Any]:
    def work(*args: Any, **kwargs: Any) -> Any:
        return 2 * inner(*args, **kwargs)

    return work


def test_a_method_is_wrapped_once() -> None:
    owner = Owner()
    for _ in range(2):
        wrap(owner, "work", ("given",), doubled)
    assert owner.work(1) == 4
    assert Owner().work(1) == 2


def test_what_is_not_there_is_said_by_name() -> None:
    with pytest.raises(NotThere, match=r"this vLLM has no Owner\.rest"):
        wrap(Owner(), "rest", (), doubled)
    with pytest.raises(NotThere, match=r"Owner\.work of this vLLM takes no other"):
        wrap(Owner(), "work", ("other",), doubled)


def test_who_passes_everything_on_may_stand_in_between() -> None:
    owner = Owner()
    owner.work = doubled(owner.work)  # type: ignore[method-assign]
    wrap(owner, "work", ("given",), doubled)
    assert owner.work(1) == 8


def test_a_stranger_in_front_of_a_method_of_vllm_is_named_and_a_subclass_is_none() -> None:
    here = __name__

    class Own(Owner):
        def work(self, given: int) -> int:
            return super().work(given)

    assert stranger(Owner(), "work") == here, "the method of this test's class is not vLLM's"
    assert stranger(Own(), "missing") is None
    changed = type("Other", (), {"work": lambda self: 1, "__module__": "elsewhere"})()
    assert stranger(changed, "work") is None, "a class of a user's own is what vLLM was told to use"


@pytest.mark.parametrize("enabled", [None, "", "0", "false", "off"])
def test_nothing_is_loaded_unless_it_is_switched_on(enabled: str | None) -> None:
    script = (
        "import os, sys\n"
        f"enabled = {enabled!r}\n"
        "os.environ.pop('INSITU_ENABLED', None)\n"
        "if enabled is not None: os.environ['INSITU_ENABLED'] = enabled\n"
        "from insitu.vllm.plugin import register\n"
        "register(); register()\n"
        "print(*[name for name in sys.modules if name.startswith(('torch', 'vllm', 'pyarrow', 'insitu.vllm'))])"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["insitu.vllm", "insitu.vllm.plugin"]


def test_a_switch_that_says_neither_is_one_line_and_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(installing, "_installed", False)
    monkeypatch.setenv("INSITU_DISABLED", "maybe")
    for _ in range(2):
        installing.install()
    (line,) = caplog.messages
    assert line.startswith("insitu: vLLM: not observed: INSITU_DISABLED: 'maybe' is no switch; write 1")


class Scheduler:
    """Stands for vLLM's: it has a configuration, and schedules."""

    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_index=0),
        model_config=SimpleNamespace(model="m"),
        cache_config=SimpleNamespace(num_gpu_blocks=1, block_size=16),
    )

    def schedule(self) -> str:
        return "decided"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("INSITU_TO", "grpc://h:0", "destination grpc://h:0: there is no such port; write one from 1 to 65535"),
        ("INSITU_KEEP_FOR", "ever", "INSITU_KEEP_FOR: 'ever' is no length of time"),
    ],
)
def test_a_setting_that_cannot_be_used_is_one_line_without_a_class_and_the_scheduler_goes_on(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("INSITU_TO", "memory://scheduler")
    monkeypatch.setenv(variable, value)
    assert observed(Scheduler)().schedule() == "decided"
    (line,) = caplog.messages
    assert line.startswith(f"insitu: requests and steps' numbers: not observed: {said}")
    assert "Error" not in line
