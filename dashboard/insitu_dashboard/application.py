"""The web server of the dashboard: Streamlit's pages and our streams on one port, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

SETTINGS: Final = {
    "browser.gatherUsageStats": False,
    "client.showErrorDetails": "none",
    "client.toolbarMode": "minimal",
    "logger.level": "error",
    "server.fileWatcherType": "none",
    "server.headless": True,
}
"""Over whatever a user has set for apps of their own: nothing is sent anywhere, no traceback reaches a viewer."""

_log = logging.getLogger("insitu")


def serve(store: str, listener: socket.socket, address: str) -> None:
    """Serve the dashboard of a store on a bound socket until SIGTERM or SIGINT. Prints its address when it is ready."""
    from streamlit.web import bootstrap

    from insitu_dashboard import pages
    from insitu_dashboard.hub import Hub

    bootstrap.load_config_options(SETTINGS)
    hub = Hub(store).start()
    pages.use(hub)
    try:
        asyncio.run(_serve(hub, listener, address))
    finally:
        hub.close()


async def _serve(hub: Any, listener: socket.socket, address: str) -> None:
    import click
    import uvicorn
    from streamlit.starlette import App

    from insitu_dashboard.stream import routes

    class Server(uvicorn.Server):
        """A uvicorn that leaves signals to us."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    app = App(Path(__file__).with_name("script.py"), routes=routes(hub, address), on_script_error=_on_script_error)
    config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).disabled = True  # Streamlit gives them handlers and a level of its own
    server = Server(config)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(stop.wait())
    while not server.started and not serving.done() and not stop.is_set():
        await asyncio.sleep(0.02)
    if server.started:
        host = f"[{address}]" if ":" in address else address
        click.echo(f"dashboard on http://{host}:{listener.getsockname()[1]}", err=True)
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    hub.stop_streams()
    server.should_exit = True
    stopping.cancel()
    await serving


def _on_script_error(error: Exception) -> bool:
    """Tell viewers what to do instead of showing them a traceback; the log has it, under the same id."""
    import streamlit as st

    name = uuid.uuid4().hex[:8]
    _log.error("insitu: a page failed (%s)", name, exc_info=error)
    st.error(
        f"This page failed (error {name}). Neither the record nor the traffic is touched. Reload the page; what "
        "`insitu dashboard` printed says more."
    )
    return True
