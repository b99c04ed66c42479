"""What browsers fetch by themselves: pictures and spans as server-sent events, the spans of a window, the status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from insitu_dashboard.hub import Hub
from insitu_dashboard.picture import DEFAULT_WINDOW_S, WINDOWS_S

LOOK_S: Final = 0.25
"""How often a stream looks for something to send: spans go out at most this often."""
MOST_STREAMS: Final = 64
MOST_PIXELS: Final = 8_000
LONGEST_WINDOW_NS: Final = 3600 * 1_000_000_000
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def routes(hub: Hub, address: str) -> list[Route]:
    """Return the routes beside Streamlit's own. `address`: what the server is bound to."""

    def guarded(request: Request) -> Response | None:
        return _refusal(request, address)

    async def live(request: Request) -> Response:
        refused = guarded(request)
        if refused is not None:
            return refused
        if hub.num_streams >= MOST_STREAMS:
            return PlainTextResponse("too many pages are open already", 503, {"Retry-After": "10"})
        window_s = _number(request, "win")
        window_s = window_s if window_s in WINDOWS_S else DEFAULT_WINDOW_S
        run = request.query_params.get("run")
        frames = _frames(hub, run, window_s, with_spans=request.query_params.get("spans") == "1")
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(frames, media_type="text/event-stream", headers=headers)

    async def spans(request: Request) -> Response:
        t0, t1, pixels = (_number(request, name) for name in ("t0", "t1", "px"))
        refused = guarded(request)
        if refused is not None:
            return refused
        if t0 is None or t1 is None or not 0 < t1 - t0 <= LONGEST_WINDOW_NS:
            return PlainTextResponse("t0 and t1 are Unix nanoseconds, t0 < t1, at most an hour apart", 400)
        run = request.query_params.get("run")
        width = min(max(1, pixels or 1200), MOST_PIXELS)
        found = await asyncio.to_thread(hub.spans, run, t0, t1, width)
        if found is None:
            return PlainTextResponse("there is no such run among the recent ones", 404)
        return Response(found, media_type="application/json", headers={"Cache-Control": "no-store"})

    async def status(request: Request) -> Response:
        found = {"schema": "insitu.dashboard/1", "streams": hub.num_streams, "runs": hub.runs(), "error": hub.error}
        return guarded(request) or JSONResponse(found)

    return [Route("/api/live", live), Route("/api/spans", spans), Route("/api/status", status)]


async def _frames(hub: Hub, run: str | None, window_s: int, *, with_spans: bool) -> AsyncIterator[bytes]:
    """Yield events until the browser goes away or the server stops."""
    hub.num_streams += 1
    loop = asyncio.get_running_loop()
    due, number = loop.time(), -1
    try:
        yield b"retry: 1000\n\n"
        while not hub.is_closing:
            if loop.time() >= due:
                due = loop.time() + hub.tick_s
                yield _event("picture", await asyncio.to_thread(hub.picture, run, window_s))
            if with_spans:
                number, texts = await asyncio.to_thread(_spans_after, hub, run, number)
                for text in texts:
                    yield _event("spans", text)
            await asyncio.sleep(LOOK_S)
    finally:
        hub.num_streams -= 1


def _spans_after(hub: Hub, run: str | None, number: int) -> tuple[int, list[str]]:
    texts = hub.new_spans(run, number) if number >= 0 else None
    if texts is not None:
        return number + len(texts), texts
    found = hub.live_spans(run)
    return (-1, []) if found is None else (found[0], [found[1]])


def _event(name: str, text: str) -> bytes:
    return f"event: {name}\ndata: {text}\n\n".encode()


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _refusal(request: Request, address: str) -> Response | None:
    """Return a 403 for pages of other sites: neither a foreign origin nor a foreign name for this host gets data."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if address in _LOOPBACK and (urlsplit(f"//{host}").hostname or "") not in _LOOPBACK:
        return PlainTextResponse("this dashboard answers on the loopback address only", 403)
    if request.headers.get("sec-fetch-site") == "cross-site" or (origin and urlsplit(origin).netloc != host):
        return PlainTextResponse("this dashboard answers its own pages only", 403)
    return None
