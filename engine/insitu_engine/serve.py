"""`insitu serve`: an OpenAI-shaped server over a pipeline of ranks."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import click

from insitu.config import Origin
from insitu.config_show import load_for_command
from insitu.interrupts import ending_at_once
from insitu.plugins.discovery import is_plugged_destination
from insitu_engine.config import EngineConfig
from insitu_engine.demo_plan import default_model
from insitu_engine.errors import EngineError, one_line, say

DEFAULT_TO = "grpc://127.0.0.1:4317"
MOST_IN_FLIGHT: Final = 256
"""Each holds a step on every rank; far more than any pipeline has stages."""


def _split(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of layer counts like 4,4") from None


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Hugging Face checkpoint folder.  [default: the tiny-llama that comes with insitu]",
)
@click.option("--stages", type=click.IntRange(min=1), default=1, show_default=True, help="Pipeline stages.")
@click.option("--split", callback=_split, help="Layers of each stage, like 5,3; balanced by cost if not given.")
@click.option(
    "--in-flight", type=click.IntRange(1, MOST_IN_FLIGHT), help="Micro-batches in flight; one a stage if not given."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--to", default=None, help=f"Where the probe sends, like {DEFAULT_TO}; nothing is observed without it.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--max-len", type=click.IntRange(min=2), help="Most tokens of a request, prompt and output.")
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Requests a micro-batch.")
@click.option("--token-budget", type=click.IntRange(min=2), default=128, show_default=True, help="Most rows of a step.")
@click.option("--max-queue", type=click.IntRange(min=1), default=64, show_default=True, help="Requests that may wait.")
@click.option("--kv-mib", type=click.IntRange(min=1), default=256, show_default=True, help="Key/value memory a rank.")
@click.option(
    "--sample",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Rows of this share of requests; a traceparent decides.",
)
@click.option("--grace", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Seconds to finish in.")
def serve(
    model: Path | None,
    stages: int,
    split: tuple[int, ...] | None,
    in_flight: int | None,
    host: str,
    port: int,
    to: str | None,
    dtype: str,
    device: str,
    max_len: int | None,
    max_batch: int,
    token_budget: int,
    max_queue: int,
    kv_mib: int,
    grace: float,
    sample: float | None,
) -> None:
    """Serve a model over HTTP (/v1/completions, /v1/models, /health/ready), one process a pipeline stage.

    When it stops, one line of JSON on stdout says how many records every process made and where they went.

    \b
    insitu serve --stages 2 --port 0
    insitu serve --stages 2 --port 0 --to file://./insitu-store
    insitu serve --stages 2 --port 0 --to file://./insitu-store --sample 0.01
    """
    began_s = time.monotonic()
    _one_thread_each()
    settings = load_for_command(to=to)
    if settings.origin("to") is not Origin.DEFAULT:
        to = str(settings.to)
    try:
        config = EngineConfig(
            model=model or default_model(),
            num_stages=stages,
            split=split,
            in_flight=in_flight,
            host=host,
            port=port,
            to=to,
            dtype=dtype,
            device=device,
            max_len=max_len,
            max_batch=max_batch,
            token_budget=token_budget,
            max_queue=max_queue,
            kv_bytes=kv_mib << 20,
            grace_s=grace,
            sample=sample,
        )
        _run(config, began_s)
    except EngineError as error:
        say(one_line(error))
        sys.exit(1)


def _run(config: EngineConfig, began_s: float) -> None:
    _check_destination(config.to)
    if not config.model.is_dir():
        raise EngineError(f"no checkpoint folder at {config.model}; --model wants a Hugging Face checkpoint folder")
    with _listen(config.host, config.port) as listener:
        if config.to is None:
            say(f"nothing is observed; start `insitu collect --store DIR` and add --to {DEFAULT_TO} to see inside")
        # A collection would walk what the imports make again and again; the launcher turns it on once they are done.
        gc.disable()
        with ending_at_once():
            from insitu_engine.launcher import launch

        with closing(launch(config, listener)) as launched:
            # Imported while the ranks load.
            from insitu_engine.server import run

            run(config, launched, listener, began_s)


def _one_thread_each() -> None:
    """Give the math libraries one thread a process: ranks share the cores. Must precede the first import of torch."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _check_destination(to: str | None) -> None:
    if to is None or urlsplit(to).scheme in ("grpc", "grpcs", "file", "otlp", "memory") or is_plugged_destination(to):
        return
    raise EngineError(f"--to {to!r} has no known scheme; use {DEFAULT_TO} or file://FOLDER")


def _listen(host: str, port: int) -> socket.socket:
    """Return a bound, listening socket. Raises EngineError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        what = error.strerror or str(error)
        raise EngineError(f"cannot listen on {host}:{port}: {what}; choose another --port or --host") from None
    listener.setblocking(False)
    return listener


if __name__ == "__main__":
    serve()
