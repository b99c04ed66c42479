"""`insitu sites`: where a model can be observed, from its config alone; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from insitu.sites.catalogue import Catalogue
    from insitu.sites.site import Site

SCHEMA: Final = "insitu.sites/1"
CONFIG: Final = "config.json"
_AUTO: Final = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
"""Which class of transformers is built where a config names none: the first that knows it."""


def meta_model(model: str) -> Any:
    """Return a model on the meta device: no weight is read or made.

    model: a folder with config.json, or a model type of transformers. Raises ClickException, one line.
    """
    import torch
    import transformers

    config = _config(model)
    names = [*(getattr(config, "architectures", None) or ()), *_AUTO]
    error: Exception | None = None
    for name in names:
        cls = getattr(transformers, name, None)
        if cls is None:
            continue
        try:
            with torch.device("meta"):
                built = cls.from_config(config) if name in _AUTO else cls(config)
        except Exception as failure:  # another author's code, on a config from anywhere
            error = error or failure
            if name not in _AUTO:
                break
        else:
            return built.to(dtype=getattr(config, "dtype", None) or torch.float32).eval()
    raise click.ClickException(f"{model} describes no model that transformers can build: {_one_line(error)}")


def _config(model: str) -> Any:
    from transformers import AutoConfig

    path = Path(model)
    if (path / CONFIG).is_file():
        try:
            return AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:
            raise click.ClickException(f"{path / CONFIG} is not understood: {_one_line(error)}") from None
    if path.exists():
        raise click.ClickException(f"{model} has no {CONFIG}; give a Hugging Face checkpoint folder")
    try:
        return AutoConfig.for_model(model)
    except Exception:
        message = f"no folder {model}, and transformers knows no model type of that name (such as llama, gpt2, bert)"
        raise click.ClickException(message) from None


def _one_line(error: Exception | None) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else text[:197] + "..."


@dataclass(frozen=True, slots=True)
class Row:
    """Sites that are alike in layers that follow each other, under one glob."""

    glob: str
    site: Site
    fqn: str


def rows_of(sites: Iterable[Site], num_layers: int) -> list[Row]:
    """Return the sites as a person reads them: a row for what is alike in all layers, in order of execution."""
    rows: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        rows.setdefault(_alike(site), []).append(site)
    return [row for alike in rows.values() for row in _ranges(alike, num_layers)]


def _alike(site: Site) -> tuple[Any, ...]:
    return *_general(site, "*"), site.io, site.index, site.part, site.shard, site.axis, site.dtype, site.default


def _general(site: Site, layers: str) -> tuple[str, str]:
    """Return name and path, `layers` and `N` in the place of the layer's number."""
    if site.layer is None:
        return site.name, site.fqn
    parts = site.fqn.split(".")
    parts[parts.index(str(site.layer))] = "N"
    return site.name.replace(f"L{site.layer}.", f"L{layers}.", 1), ".".join(parts)


def _ranges(alike: Sequence[Site], num_layers: int) -> Iterator[Row]:
    """Yield a row for each run of layers that follow each other."""
    for _, numbered in groupby(enumerate(alike), key=lambda item: (item[1].layer or 0) - item[0]):
        run = [site for _, site in numbered]
        first, last = run[0].layer, run[-1].layer
        layers = "*" if len(run) == num_layers else f"[{first}-{last}]" if first != last else str(first)
        name, fqn = _general(run[0], layers)
        yield Row(name, run[0], fqn)


def document(model: str, built: Any, catalogue: Catalogue, sites: Sequence[Site]) -> dict[str, Any]:
    """Return what `--json` prints: every site, one by one, in order of execution."""
    return {
        "schema": SCHEMA,
        "model": model,
        "class": type(built).__name__,
        "sites": [_entry(site) for site in sites],
        "absent": [{"name": name, "why": why} for name, why in catalogue.absent.items() if ":" not in name],
    }


def _entry(site: Site) -> dict[str, Any]:
    part = site.part
    return {
        "name": site.name,
        "layer": site.layer,
        "module": site.fqn,
        "io": site.io,
        "index": site.index,
        "columns": None if part is None else {"of": part.run, "start": part.start, "stop": part.stop},
        "shard": site.shard,
        "axis": site.axis,
        "dtype": site.dtype or None,
        "default": site.default,
    }


def table(built: Any, catalogue: Catalogue, sites: Sequence[Site]) -> str:
    """Return the sites as aligned lines; what is alike in every layer is one line, under a glob that a rule takes."""
    num_layers = len({site.layer for site in catalogue.sites if site.layer is not None})
    rows = [("site", "module", "what of it", "shard", "axis", "dtype", "tapped")]
    rows += [
        (
            row.glob,
            row.fqn or "the model",
            _what(row.site),
            row.site.shard,
            row.site.axis,
            row.site.dtype or "?",
            "always" if row.site.default else "by rule",
        )
        for row in rows_of(sites, num_layers)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{type(built).__name__}: {len(sites)} sites"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *_absent(catalogue)])


def _what(site: Site) -> str:
    which = f"{site.io}[{site.index}]" if site.index else site.io
    if site.part is None:
        return which
    return f"{which}, columns {site.part.start}-{site.part.stop - 1} of every {site.part.run}"


def _absent(catalogue: Catalogue) -> list[str]:
    """Return a line for each name that this model has nowhere, with the reason in its first layer."""
    has = {site.name.rpartition(".")[2] for site in catalogue.sites}
    why: dict[str, str] = {}
    for name, reason in catalogue.absent.items():
        short = name.rpartition(".")[2]
        if ":" not in name and short not in has:
            why.setdefault(short, reason)
    return [f"no {name}: {reason}" for name, reason in why.items()]


@click.command()
@click.argument("model", metavar="MODEL_DIR")
@click.argument("globs", nargs=-1, metavar="[SITES]...")
@click.option("--json", "as_json", is_flag=True, help=f"Print one JSON document ({SCHEMA}).")
def sites(model: str, globs: tuple[str, ...], as_json: bool) -> None:
    """Print where a model can be observed, and what rules may name, without loading its weights.

    MODEL_DIR is a folder with config.json, or a model type of transformers. SITES are globs as a rule has them: only
    what they mean is printed, and one that means nothing is an error with the reason and the nearest names.

    \b
    insitu sites gpt2
    insitu sites llama 'L*.attn_z' 'L[0-3].mlp_*'
    insitu sites bert --json | python -m json.tool
    """
    from insitu.sites.catalogue import catalogue

    built = meta_model(model)
    found = catalogue(built)
    try:
        named = {site.name for glob in globs for site in found.find(glob)}
        chosen = [site for site in found.plan(globs) if site.name in named] if globs else list(found.sites)
    except ValueError as error:  # a glob that means nothing, or is none
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(document(model, built, found, chosen), indent=1))
    else:
        click.echo(table(built, found, chosen))
