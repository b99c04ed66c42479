"""Opening a checkpoint folder: everything wrong with it is said in one line, before any process is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu_engine.checkpoint import open_checkpoint, read_weights
from insitu_engine.errors import EngineError


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    copy: Path = shutil.copytree(make_checkpoint(), tmp_path / "model")
    return copy


def edit(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refusal(folder: Path) -> str:
    with pytest.raises(EngineError) as caught:
        open_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_good_one_opens(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.num_layers == 4
    assert checkpoint.name == "model"
    assert checkpoint.end_ids == {2}
    assert len(set(checkpoint.layer_bytes)) == 1
    assert checkpoint.head_bytes == (300 * 64 + 64) * 4


def test_several_end_ids(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert open_checkpoint(folder).end_ids == {5, 6}


def test_no_folder(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["{half", "[]", "\x00"])
def test_config_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"model_type": "gpt2"}, "not rotary"),
        ({"model_type": "mixtral"}, "experts"),
        ({"model_type": "gemma2"}, "not been verified"),
        ({"model_type": "t5"}, "encoder"),
        ({"model_type": "deepseek_v3"}, "latent"),
        ({"model_type": "mamba"}, "recurrent"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantised"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "length of a request"),
    ],
)
def test_an_unsupported_architecture_is_told_what_is_missing(
    folder: Path, fields: dict[str, Any], missing: str
) -> None:
    if "model_type" in fields:
        (folder / "config.json").write_text(json.dumps(fields))
    else:
        edit(folder, **fields)
    text = refusal(folder)
    assert missing in text
    assert "llama, mistral, qwen2, qwen3" in text


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    edit(folder, model_type="made_up")
    assert "made_up" in refusal(folder)


def test_a_config_that_describes_no_model(folder: Path) -> None:
    edit(folder, hidden_size=63)
    refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    text = refusal(folder)
    assert "truncated" in text and "model.safetensors" in text


def test_weights_of_another_size(folder: Path) -> None:
    edit(folder, intermediate_size=128)
    text = refusal(folder)
    assert "mlp" in text and "shape" in text


def test_weights_of_fewer_layers(folder: Path) -> None:
    edit(folder, num_hidden_layers=5)
    assert "model.layers.4" in refusal(folder)


def test_weights_in_several_files(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: whole[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder)

    def some() -> Iterator[str]:
        yield from names[:3]

    read = read_weights(checkpoint, some(), torch.float32)
    assert set(read) == set(names[:3])
    assert all(torch.equal(read[name], whole[name]) for name in read)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors is missing" in refusal(folder)
