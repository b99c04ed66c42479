"""How wide the rows of a model's sites are: from one forward on the meta device, where nothing is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from insitu.sites.site import Site

logger = logging.getLogger("insitu")

Shape = tuple[int, str]
"""Width, and torch's name of the type."""
NUM_TOKENS = 4


def shapes_of(model: nn.Module, sites: Sequence[Site]) -> dict[int, Shape]:
    """Return by site number the shape of its rows; sites of which nothing can be known are left out.

    Where the forward cannot go on (experts whose rows depend on values), a layer is like those that were reached, and
    the rest is what the config says.
    """
    found: dict[int, Shape] = {}
    modules = dict(model.named_modules())
    with _watched(modules, sites, found):
        try:
            with torch.inference_mode():
                model(**_inputs(model))
        except Exception as error:  # another author's code, on a device it may never have seen
            logger.debug("insitu: the forward on the meta device ended early: %s", error)
    alike = {_kind(site): found[site.number] for site in sites if site.number in found}
    for site in sites:
        shape = found.get(site.number) or alike.get(_kind(site)) or _by_module(modules[site.fqn], site)
        shape = shape or _by_config(model, site)
        if shape is not None:
            found[site.number] = shape
    return found


def _kind(site: Site) -> tuple[Any, ...]:
    return site.name.rpartition(".")[2] if site.layer is not None else site.name, site.io, site.index, site.part


def _inputs(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.zeros((1, config.num_channels, *sides), device="meta")}
    ids = torch.zeros((1, NUM_TOKENS), dtype=torch.int64, device="meta")
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids, **decoder}


@contextmanager
def _watched(modules: Mapping[str, nn.Module], sites: Sequence[Site], found: dict[int, Shape]) -> Iterator[None]:
    handles = []
    for site in sites:
        module, keep = modules[site.fqn], _keeper(site, found)
        if site.io == "in":
            handles.append(module.register_forward_pre_hook(_of_input(keep), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(_of_output(keep)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(site: Site, found: dict[int, Shape]) -> Callable[[Any], None]:
    def keep(values: Any) -> None:
        x = values if isinstance(values, torch.Tensor) else values[site.index]
        if not isinstance(x, torch.Tensor):
            return
        width = x.shape[-1] if x.ndim > 1 else 1
        if site.part is not None:
            width = width // site.part.run * (site.part.stop - site.part.start)
        found[site.number] = (width, str(x.dtype).removeprefix("torch."))

    return keep


def _of_input(keep: Callable[[Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        keep([value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)])

    return hook


def _of_output(keep: Callable[[Any], None]) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(output)

    return hook


def _by_module(module: nn.Module, site: Site) -> Shape | None:
    """Return what a projection reads or returns."""
    width = getattr(module, "in_features" if site.io == "in" else "out_features", None)
    return (width, site.dtype) if isinstance(width, int) and site.part is None and site.dtype else None


def _by_config(model: nn.Module, site: Site) -> Shape | None:
    """Return the shape that a config states: of the residual stream, and of what the ends of a model return."""
    config: Any = getattr(model, "config", None)
    name = site.name.rpartition(".")[2]
    if config is None or not site.dtype:
        return None
    residual = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post", "final_norm")
    width = getattr(config, "vocab_size" if name == "logits" else "hidden_size", None)
    known = isinstance(width, int) and (name == "logits" or name in residual)
    return (width, site.dtype) if known and isinstance(width, int) else None
