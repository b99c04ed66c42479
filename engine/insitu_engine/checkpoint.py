"""A Hugging Face checkpoint folder: its config, the shape of its weights, and loading just the wanted ones."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from insitu_engine import architecture
from insitu_engine.attention import NAME, register
from insitu_engine.errors import EngineError, one_line

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: config read, architecture accepted, every weight found with its right shape."""

    path: Path
    config: Any
    """A transformers config of our own copy, with our attention."""
    files: Mapping[str, Path]
    """Weight name -> the safetensors file that holds it."""
    layer_bytes: tuple[int, ...]
    """Parameter bytes of each layer, as stored in float32."""
    head_bytes: int
    """Parameter bytes of final norm and lm_head, which the last stage carries besides its layers."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def tied(self) -> bool:
        """True where lm_head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def num_kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        generation = self.path / "generation_config.json"
        found = _read_json(generation).get("eos_token_id") if generation.exists() else None
        found = self.config.eos_token_id if found is None else found
        return frozenset([found] if isinstance(found, int) else found or [])


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder and check all of it but the values. Raises EngineError in one line."""
    if not path.is_dir():
        raise EngineError(f"no checkpoint folder at {path}; give --model a folder with config.json and *.safetensors")
    if not (path / "config.json").is_file():
        raise EngineError(f"{path} has no config.json; --model wants a Hugging Face checkpoint folder")
    config = _read_config(path)
    architecture.check(config)
    try:
        whole = meta_model(config)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise EngineError(f"{path}/config.json does not describe a model: {_brief(error)}") from None
    files, shapes = _read_headers(path)
    expected = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    for name, shape in expected.items():
        if name not in shapes:
            raise EngineError(f"{path} is incomplete: weight {name} is missing; download the checkpoint again")
        if shapes[name] != shape:
            raise EngineError(f"{path}: weight {name} has shape {shapes[name]}, config.json says {shape}")
    sizes = [_num_bytes(layer) for layer in whole.model.layers]
    head_bytes = _num_bytes(whole.model.norm) + _num_bytes(whole.lm_head)
    return Checkpoint(path, config, files, tuple(sizes), head_bytes)


def meta_model(config: Any) -> Any:
    """Return the whole model without any weight: every tensor is on the meta device."""
    from transformers import AutoModelForCausalLM

    register()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    raw = _read_json(path / "config.json")
    try:
        config = copy.deepcopy(AutoConfig.from_pretrained(path, local_files_only=True))
    except Exception as error:
        kind = raw.get("model_type")
        raise EngineError(f"{path}/config.json (model_type {kind!r}) is not understood: {_brief(error)}") from None
    config._attn_implementation = NAME
    return config


def _brief(error: Exception) -> str:
    text = one_line(error)
    return text if len(text) < 160 else text[:157] + "..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read as JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise EngineError(f"{path} does not hold a JSON object")
    return found


def _read_headers(path: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """Return (file, shape) by weight name, having checked that every file is as long as its header says."""
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(path):
        for name, entry in _header(file).items():
            files[name], shapes[name] = file, tuple(entry["shape"])
    return files, shapes


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        names = sorted(set(_read_json(path / INDEX).get("weight_map", {}).values()))
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise EngineError(f"{path} has no *.safetensors; convert its weights to safetensors first")
    for file in files:
        if not file.is_file():
            raise EngineError(f"{path} is incomplete: {file.name} is missing; download the checkpoint again")
    return files


def _header(file: Path) -> dict[str, Any]:
    """Return a safetensors header: u64 length, JSON, then data up to the largest end offset."""
    broken = EngineError(f"{file} is truncated or damaged; download the checkpoint again")
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            if length > size - 8:
                raise broken
            header: dict[str, Any] = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, TypeError, KeyError, AttributeError):
        raise broken from None
    if 8 + length + end != size:
        raise broken
    return header


def _num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def read_weights(checkpoint: Checkpoint, names: Iterator[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read the named weights, each from its own file, as `dtype`. A tied lm_head comes from the embedding."""
    from safetensors import safe_open

    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name in names:
        stored = name if name in checkpoint.files else "model.embed_tokens.weight"
        by_file.setdefault(checkpoint.files[stored], []).append((name, stored))
    weights = {}
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name, stored in wanted:
                weights[name] = opened.get_tensor(stored).to(dtype)
    return weights
