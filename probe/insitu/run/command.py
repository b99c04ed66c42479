"""`insitu run -- COMMAND`: becomes the command, whose Python processes attach insitu to the model they serve."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from insitu.config import MODEL_VARIABLE, STAGE_VARIABLE
from insitu.identity import current_run
from insitu.plugins.discovery import is_plugged_destination
from insitu.setting_values import is_on
from insitu.vocabulary import HIGHEST_RANK

STARTUP: Final = Path(__file__).with_name("startup")
"""The folder that leads PYTHONPATH; it holds a `sitecustomize` and nothing else."""
NOT_FOUND: Final = 127
CANNOT_RUN: Final = 126
"""Exit statuses of a command that did not start, as shells and `env` have them."""
_WITH_VALUE: Final = ("-W", "-X", "--check-hash-based-pycs")
_SCHEMES: Final = ("grpc", "grpcs", "file", "otlp")


def environment_of(
    environment: Mapping[str, str], to: str | None, stage: str | None, model: str | None
) -> dict[str, str]:
    """Return what the command is to find in its environment."""
    changed = dict(environment)
    before = environment.get("PYTHONPATH")
    others = [path for path in before.split(os.pathsep) if path != str(STARTUP)] if before else []
    changed["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *others])  # an empty one among them is a folder too
    told = {"INSITU_TO": to, STAGE_VARIABLE: stage, MODEL_VARIABLE: model}
    return changed | {name: value for name, value in told.items() if value is not None}


def is_deaf(command: Sequence[str]) -> bool:
    """Tell whether a command is a Python that was told to take nothing from its environment (-I, -E, -S)."""
    words = iter(command)
    if not Path(next(words, "")).name.startswith("python"):
        return False
    for word in words:
        if not word.startswith("-") or word in ("-", "--", "-c", "-m"):
            return False
        if word in _WITH_VALUE:
            next(words, None)
        elif not word.startswith(("--", "-W", "-X")) and set(word.partition("c")[0].partition("m")[0]) & set("IES"):
            return True
    return False


def _destination(_: click.Context, __: click.Parameter, to: str | None) -> str | None:
    if to is None:
        return None
    scheme, mark, path = to.partition("://")
    if not mark or not (scheme.lower() in _SCHEMES or is_plugged_destination(to)):
        raise click.BadParameter(f"{to!r} is no destination; write it like grpc://HOST:PORT or file://STORE")
    if scheme.lower() != "file":
        return to
    return f"file://{Path(path).absolute()}"  # the command may change its folder


def _stage(_: click.Context, __: click.Parameter, stage: str | None) -> str | None:
    if stage is None or stage == "rank" or (stage.isdecimal() and float(stage) <= HIGHEST_RANK):
        return stage
    raise click.BadParameter(f"{stage!r:.80} is no stage; write a number from 0 to {HIGHEST_RANK}, or rank")


def become(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Replace this process by the command. Raises SystemExit when it cannot be started."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and what is ignored stays so
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        click.echo(f"insitu: {command[0]}: {error.strerror}", err=True)
        raise SystemExit(NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN) from None


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--to",
    metavar="DEST",
    callback=_destination,
    help="grpc://HOST:PORT, file://STORE or otlp://HOST:PORT.  [env: INSITU_TO]",
)
@click.option("--stage", metavar="N", callback=_stage, help="The pipeline stage; `rank`: each rank is one.  [0]")
@click.option("--model", metavar="GLOB", help="The model's class, where it is not the outermost module.  [*]")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(to: str | None, stage: str | None, model: str | None, command: tuple[str, ...]) -> None:
    """Run a command with insitu attached to the torch model it serves: your own server, its code as it is.

    The model is the outermost module with parameters that is called for inference, in any Python process the command
    starts. Works for `-- python serve.py`, `-- torchrun --nproc-per-node 2 serve.py`, and a server's own command.

    \b
    insitu run -- python -c "import torch; print(torch.nn.Linear(4, 2).eval()(torch.ones(1, 4)))"
    insitu run --to file://./seen -- python -c "import torch; print(torch.nn.Linear(4, 2).eval()(torch.ones(1, 4)))"
    """
    try:
        is_off = is_on(os.environ.get("INSITU_DISABLED", ""))
    except ValueError as error:
        raise click.ClickException(f"INSITU_DISABLED: {error}") from None
    if is_off:
        become(command, os.environ)
    if is_deaf(command):
        click.echo("insitu: nothing is observed of a Python with -I, -E or -S: it never looks at us", err=True)
    current_run()  # one for all that the command starts
    become(command, environment_of(os.environ, to, stage, model))
