"""What a demo is to run: the checkpoint, the store, and the faults, checked before anything is started."""

from __future__ import annotations

import json
import os
import random
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from insitu.cli import ExitCode
from insitu_engine.inject import check_faults, parse_fault

DEFAULT_FAULT: Final = "slow-stage=1:25"
RANDOM_KINDS: Final = ("slow-stage", "nan", "gc", "hang")


class BadUse(click.ClickException):
    """A mistake in what was asked for: one line, and the exit status of a usage error."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run."""

    model: Path
    num_stages: int
    store: Path
    seconds: float
    seed: int
    specs: tuple[str, ...]
    serve_options: tuple[str, ...] = ()
    """What is passed on to `insitu serve`, ..."""
    load_options: tuple[str, ...] = ()
    """... and to `insitu load`."""


def passed_on(option: str, text: str, taken: Sequence[str]) -> tuple[str, ...]:
    """Return the words of a text of options. Raises BadUse, one line, for one that the demo gives itself."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise BadUse(f"{option} {text!r} cannot be read: {str(error).lower()}") from None
    own = sorted({word.partition("=")[0] for word in words} & set(taken))
    if own:
        raise BadUse(f"{option}: the demo itself gives {', '.join(own)}; leave it out")
    return words


def default_model() -> Path:
    """Return the checkpoint that comes with insitu, from the wheel or from the source tree."""
    here = Path(__file__).resolve().parent
    places = (here / "models/tiny-llama", here.parents[1] / "examples/models/tiny-llama")
    found = next((place for place in places if (place / "config.json").exists()), None)
    if found is None:
        raise click.ClickException("no checkpoint came with this installation; give --model a Hugging Face folder")
    return found


def num_layers(model: Path) -> int:
    """Return how many layers a checkpoint says it has. Raises ClickException, one line, when it is none."""
    try:
        return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])
    except FileNotFoundError:
        raise click.ClickException(
            f"no checkpoint at {model}: there is no config.json; give --model a Hugging Face folder"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{model / 'config.json'} cannot be used ({error}); give another --model") from None


def check_stages(num_stages: int, num_layers: int) -> None:
    """Raise ClickException, one line, when there are more stages than layers."""
    if num_stages > num_layers:
        raise click.ClickException(
            f"--stages {num_stages} is not possible: the model has {num_layers} layers and each stage needs one"
        )


def fresh_store() -> Path:
    """Make a folder that was not there: in ./insitu-store, or in the temporary folder where that is closed.

    Making it is what claims it: another demo in the same place gets another one. Raises ClickException, one line.
    """
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    parent = Path("insitu-store") if os.access(".", os.W_OK) else Path(tempfile.gettempdir()) / "insitu-store"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return next(path for n in range(1, 1000) if _made(path := parent / (name if n == 1 else f"{name}-{n}")))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise click.ClickException(f"no store can be made in {parent}: {reason}; give a folder with --store") from None


def _made(path: Path) -> bool:
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def resolve_specs(given: Sequence[str], seed: int, num_stages: int, num_layers: int) -> tuple[str, ...]:
    """Return the specs for the engine: checked, `random` drawn from the seed. Raises BadUse, one line."""
    rng = random.Random(seed)
    drawn = (draw_spec(rng, num_stages, num_layers) if spec == "random" else spec for spec in given)
    specs = tuple(spec for spec in drawn if spec != "none")
    if "none" in given and specs:
        raise BadUse("--inject none means no fault; give it alone")
    try:
        check_faults([parse_fault(spec) for spec in specs], num_stages, num_layers)
    except ValueError as error:
        raise BadUse(f"--inject: {error}, random or none" if "may be" in str(error) else f"--inject: {error}") from None
    return specs


def draw_spec(rng: random.Random, num_stages: int, num_layers: int) -> str:
    """Return one fault of any kind, at a random place, after a few seconds of healthy traffic."""
    kind = rng.choice(RANDOM_KINDS)
    start_s = round(rng.uniform(5, 7), 1)
    match kind:
        case "slow-stage":
            return f"slow-stage={rng.randrange(num_stages)}:{rng.choice((10, 25, 50))}@{start_s}"
        case "nan":
            return f"nan={rng.randrange(num_layers)}:{rng.randint(50, 200)}@{start_s}"
        case "gc":
            return f"gc={rng.randrange(num_stages)}@{start_s}"
        case _:
            return f"hang={rng.randrange(num_stages)}:{rng.randint(50, 200)}@{start_s}"
