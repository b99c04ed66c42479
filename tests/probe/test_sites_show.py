"""`insitu sites` says where a model can be observed, from a config alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from insitu.cli import insitu
from insitu.sites.catalogue import catalogue
from insitu.sites.command import meta_model


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(insitu, ["sites", *map(str, args)])


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A checkpoint without its weights."""
    shutil.copy(model / "config.json", tmp_path)
    return tmp_path


def edited(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_the_model_is_on_the_meta_device_with_the_dtype_of_its_config(folder: Path) -> None:
    model = meta_model(str(folder))
    assert {(str(p.device), str(p.dtype)) for p in model.parameters()} == {("meta", "torch.bfloat16")}
    assert not model.training


def test_a_person_reads_a_line_for_what_is_alike_in_all_layers(folder: Path) -> None:
    result = run(folder)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert result.output.splitlines()[0] == "LlamaForCausalLM: 99 sites"
    assert ["L*.attn_z", "model.layers.N.self_attn.o_proj", "in", "head", "tokens", "bfloat16", "by", "rule"] in lines
    assert ["L*.resid_post", "model.layers.N", "out", "replicated", "tokens", "bfloat16", "always"] in lines
    assert [line[0] for line in lines[2:]].count("L*.q") == 1
    assert "no router_logits" not in result.output, "a name that other architectures have needs no line here"


def test_each_line_is_a_glob_that_a_rule_takes(folder: Path) -> None:
    found = catalogue(meta_model(str(folder)))
    globs = [line.split()[0] for line in run(folder).output.splitlines()[2:]]
    assert {site.name for glob in globs for site in found.find(glob)} == {site.name for site in found.sites}


def test_json_has_every_site(folder: Path) -> None:
    found = json.loads(run(folder, "--json").output)
    assert (found["schema"], found["class"]) == ("insitu.sites/1", "LlamaForCausalLM")
    sites = {site["name"]: site for site in found["sites"]}
    assert [site.name for site in catalogue(meta_model(str(folder))).sites] == list(sites)
    assert sites["L7.resid_pre"] == {
        "name": "L7.resid_pre",
        "layer": 7,
        "module": "model.layers.7",
        "io": "in",
        "index": 0,
        "columns": None,
        "shard": "replicated",
        "axis": "tokens",
        "dtype": "bfloat16",
        "default": False,
    }


def test_globs_choose_and_layers_that_differ_are_ranges(folder: Path) -> None:
    output = run(folder, "L[2-4].mlp_act", "L6.mlp_act").output
    assert [line.split()[0] for line in output.splitlines()[2:]] == ["L[2-4].mlp_act", "L6.mlp_act"]
    assert run(folder, "module:*.3.mlp.act_fn").output.splitlines()[2].startswith("module:model.layers.3.mlp.act_fn  ")


def test_layers_of_two_kinds_are_told_apart(folder: Path) -> None:
    fields = {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [0, 3], "decoder_sparse_step": 1}
    edited(folder, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", **fields)
    lines = [line.split()[0] for line in run(folder).output.splitlines()]
    assert {"L[1-2].router_topk", "L[4-7].router_topk", "L0.mlp_act", "L3.mlp_act", "L*.q"} <= set(lines)


def test_columns_of_a_fused_projection_are_said() -> None:
    output = run("gpt2", "L0.k").output
    assert "transformer.h.N.attn.c_attn  out, columns 768-1535 of every 2304" in output
    (site,) = json.loads(run("gpt2", "L0.k", "--json").output)["sites"]
    assert site["columns"] == {"of": 2304, "start": 768, "stop": 1536}


def test_what_an_architecture_has_not_is_said_with_the_reason() -> None:
    assert "\nno resid_mid: attention and MLP of such a layer both read what the layer is given" in run("phi").output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["L0.mlp_ac"], "Error: no site matches 'L0.mlp_ac'; the nearest are L0.mlp_act, "),
        (["module:model.layers"], "Error: no site matches 'module:model.layers': model.layers is a ModuleList, "),
        (["L[7-3].q"], "Error: sites='L[7-3].q': the range [7-3] is empty"),
    ],
)
def test_a_glob_that_means_nothing_is_one_line(folder: Path, args: list[str], message: str) -> None:
    result = run(folder, *args)
    assert result.exit_code == 1
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1


def test_a_folder_that_is_no_checkpoint_is_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        run(tmp_path / "empty").output: "has no config.json; give a Hugging Face checkpoint folder",
        run("no-such-thing").output: "no folder no-such-thing, and transformers knows no model type of that name",
        run(edited(folder, hidden_act="nonsense")).output: "describes no model that transformers can build: ",
        run(edited(folder, model_type="nonsense")).output: "config.json is not understood: ",
    }
    (folder / "config.json").write_text("{")
    cases[run(folder).output] = "config.json is not understood: "
    for output, message in cases.items():
        assert output.startswith("Error: ") and message in output, output
        assert output.count("\n") == 1, output
