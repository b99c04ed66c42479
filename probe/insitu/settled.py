"""What is set for this process, and what is said of it, each line once: settings that mean or do nothing here."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from insitu.config import Config, ConfigError, Origin, load
from insitu.destinations import scheme_of
from insitu.setting_values import is_on
from insitu.wire.address import SCHEMES

logger = logging.getLogger("insitu")

_said: set[str] = set()
"""Warnings this process has given."""


def settings(**arguments: Any) -> Config:
    """Return what is set, and say what is to be said of it (`tell`).

    Raises ConfigError, a ValueError, for a setting that cannot be used. `INSITU_DISABLED` works whatever else is set.
    """
    config = settled(**arguments)
    tell(config)
    return config


def settled(**arguments: Any) -> Config:
    """Return what is set, and say nothing yet: the caller may refuse what else it was given. Raises as `settings`."""
    if disabled():
        return Config(disabled=True, origins={"disabled": Origin.ENVIRONMENT})
    return load(**arguments)


def tell(config: Config) -> None:
    """Say once a process which variables mean nothing, where records go if nobody said, and what has no effect."""
    for warning in (*config.warnings(), *_of_destination(config)):
        if warning not in _said:
            logger.warning("insitu: %s", warning)
        _said.add(warning)


def _of_destination(config: Config) -> Iterator[str]:
    if config.disabled:
        return
    if config.origin("to") is Origin.DEFAULT:
        yield f"no destination given (to= or INSITU_TO); writing to {config.to}, which keeps {config.keep}"
    if config.spool is not None and scheme_of(config.to) not in SCHEMES:
        ways = {Origin.ENVIRONMENT: "INSITU_SPOOL", Origin.FILE: f"spool in {config.file}"}
        to = config.to if isinstance(config.to, str) else "an Exporter of your own"
        yield (
            f"{ways.get(config.origin('spool'), 'spool=')} has no effect: a spool holds what a grpc:// collector that "
            f"is away cannot take, and records go to {to}"
        )


def disabled() -> bool:
    """Return what INSITU_DISABLED says. Raises ConfigError where that is no switch."""
    try:
        return is_on(os.environ.get("INSITU_DISABLED", ""))
    except ValueError as error:
        raise ConfigError(f"INSITU_DISABLED: {error}") from None


def switch(config: Config) -> str:
    """Return what has switched all off, for people."""
    if config.origin("disabled") is Origin.ENVIRONMENT:
        return "INSITU_DISABLED" if disabled() else "OTEL_SDK_DISABLED"
    return f"`disabled` in {config.file}"
