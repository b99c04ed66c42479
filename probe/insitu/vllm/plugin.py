"""Entry point of `vllm.general_plugins`: does nothing, and loads nothing, unless INSITU_ENABLED says so."""

from __future__ import annotations

import os
from typing import Final

ENABLED: Final = "INSITU_ENABLED"


def register() -> None:
    """Observe this process of vLLM. vLLM may call it several times. Raises nothing: vLLM would not start."""
    if os.environ.get(ENABLED, "").strip().lower() in ("", "0", "false", "no", "off"):
        return
    from insitu.vllm.installing import install

    install()
