"""What a process of vLLM gets when it loads the plug-in: a scheduler that tells, workers that are watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from insitu.identity import current_run
from insitu.settled import disabled
from insitu.vllm.ending import wait_for_endings
from insitu.vllm.hooks import OF_SCHEDULER, NotThere, contain_start, guard, say, stranger, wrap
from insitu.vllm.versions import refused_version

_installed = False


def install() -> None:
    """Observe this process. Raises nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    try:
        if disabled():
            return
        import vllm

        if (refused := refused_version(vllm.__version__)) is not None:
            say("%s", refused)
            return
        current_run()  # the processes that are started from here inherit it
        for lost, hook in (
            (OF_SCHEDULER, _watch_schedulers),
            ("ranks", _watch_workers),
            ("the header `insitu` and the trace of a request over HTTP", _read_headers),
            ("the last second of engines that are killed as soon as they are told to end", wait_for_endings),
        ):
            _try(lost, hook)
    except Exception as error:
        contain_start(error, "vLLM")


def _try(lost: str, hook: Callable[[], None]) -> None:
    try:
        hook()
    except (NotThere, ImportError) as error:
        say("%s: not observed: %s", lost, error)


def _watch_schedulers() -> None:
    from vllm.config import SchedulerConfig

    def around(chosen: Callable[..., Any]) -> Callable[..., Any]:
        def get_scheduler_cls(self: Any) -> Any:
            scheduler = chosen(self)
            try:
                return _observed(scheduler)
            except Exception as error:
                guard.contain(error)
                return scheduler

        return get_scheduler_cls

    wrap(SchedulerConfig, "get_scheduler_cls", (), around)


def _observed(scheduler: Any) -> Any:
    from vllm.v1.engine.core import EngineCore

    from insitu.vllm.scheduling import observed

    def around(shutdown: Callable[..., Any]) -> Callable[..., Any]:
        def close_and_shut_down(self: Any, *args: Any, **kwargs: Any) -> Any:
            told = getattr(getattr(self, "scheduler", None), "insitu", None)
            if told is None:
                return shutdown(self, *args, **kwargs)
            return told.ending.close_beside(lambda: shutdown(self, *args, **kwargs))

        return close_and_shut_down

    wrap(EngineCore, "shutdown", (), around)  # it may be killed before its scheduler is told
    return observed(scheduler)


def _watch_workers() -> None:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def around(init_device: Callable[..., Any]) -> Callable[..., Any]:
        def init_device_and_watch(self: Any, *args: Any, **kwargs: Any) -> Any:
            done = init_device(self, *args, **kwargs)
            try:
                _watch_loading(self.worker)
            except Exception as error:
                guard.contain(error)
            return done

        return init_device_and_watch

    wrap(WorkerWrapperBase, "init_device", (), around)


def _watch_loading(worker: Any) -> None:
    """Watch a worker from when its model is there: neither compiled nor warm."""
    other = stranger(worker, "load_model")

    def around(load_model: Callable[..., Any]) -> Callable[..., Any]:
        def load_and_watch(*args: Any, **kwargs: Any) -> Any:
            done = load_model(*args, **kwargs)
            try:
                from insitu.vllm.worker import watch

                watch(worker, other)
            except Exception as error:
                contain_start(error, "ranks")
            return done

        return load_and_watch

    wrap(worker, "load_model", (), around)


def _read_headers() -> None:
    from insitu.vllm.http import read_headers

    read_headers()
