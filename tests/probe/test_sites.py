"""Which sites a model has, which of them are tapped, and what is said of those that are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import insitu
from insitu.sites.catalogue import MAX_MODULE_SITES, catalogue, resolve
from insitu.sites.site import Part, Site, SiteError, is_named
from insitu.testing import Recording, oracle_model

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
INSIDE = ["attn_out", "mlp_out", "resid_post"]


def build(model: str, config: str, **more: Any) -> nn.Module:
    found: nn.Module = getattr(hf, model)(getattr(hf, config)(**{**SHAPE, **more}))
    return found.eval()


def llama() -> nn.Module:
    return build("LlamaForCausalLM", "LlamaConfig")


def gpt2() -> nn.Module:
    model: nn.Module = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32))
    return model.eval()


def mixtral() -> nn.Module:
    return build("MixtralForCausalLM", "MixtralConfig", num_key_value_heads=1, num_local_experts=4)


def names(inside: list[str], before: list[str], behind: list[str]) -> list[str]:
    return [*before, *(f"L{layer}.{name}" for layer in range(2) for name in inside), *behind]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, names(INSIDE, ["embed"], ["final_norm", "logits"])),
        (gpt2, names(INSIDE, ["embed"], ["final_norm", "logits"])),
        (mixtral, names(["attn_out", "router_logits", *INSIDE[1:]], ["embed"], ["final_norm", "logits"])),
        (lambda: build("LlamaModel", "LlamaConfig"), names(INSIDE, [], [])),
        (lambda: build("BertModel", "BertConfig"), names(INSIDE, ["embed"], [])),
        (lambda: build("Gemma2ForCausalLM", "Gemma2Config"), names(INSIDE, ["embed"], ["final_norm", "logits"])),
        (lambda: build("PhiForCausalLM", "PhiConfig"), names(INSIDE, ["embed"], ["logits"])),
        (lambda: build("GPTNeoXForCausalLM", "GPTNeoXConfig"), names(INSIDE, [], ["final_norm", "logits"])),
        (lambda: build("ModernBertForMaskedLM", "ModernBertConfig"), names(INSIDE, [], [])),
        (lambda: build("Olmo2ForCausalLM", "Olmo2Config"), names(INSIDE, ["embed"], ["final_norm", "logits"])),
        (lambda: oracle_model(num_layers=2), names(INSIDE, [], [])),
    ],
)
def test_what_is_tapped_without_a_rule(make: Callable[[], nn.Module], expected: list[str]) -> None:
    model = make()
    sites = resolve(model)
    assert [site.name for site in sites] == expected
    assert [site.number for site in sites] == list(range(len(sites)))
    modules = dict(model.named_modules())
    assert all(site.fqn in modules and site.io == "out" and site.part is None for site in sites)


def test_a_decoder_ends_in_norm_and_logits_and_its_last_layer_and_logits_are_boundaries() -> None:
    sites = resolve(llama())
    assert [site.name for site in sites][-2:] == ["final_norm", "logits"]
    assert [site.name for site in sites if site.boundary] == ["L1.resid_post", "logits"]


@pytest.mark.parametrize("globs", [[], ["L*.?*"], ["module:*"]])
def test_rules_move_no_boundary(globs: list[str]) -> None:
    sites = resolve(llama(), globs=globs)
    assert [site.name for site in sites if site.boundary] == ["L1.resid_post", "logits"]


def test_a_stage_without_a_head_hands_on_its_last_layer() -> None:
    model = llama()
    del model.lm_head
    del model.model.norm
    assert [site.name for site in resolve(model) if site.boundary] == ["L1.resid_post"]


def test_any_other_module_has_its_paths_children_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert [site.name for site in resolve(model)] == ["0", "1.0", "1.1", "1", "output"]


def test_of_many_modules_the_outermost_are_tapped_and_the_others_can_be_named() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.ReLU()) for _ in range(MAX_MODULE_SITES)))
    assert [site.name for site in resolve(model)] == [*map(str, range(MAX_MODULE_SITES)), "output"]
    assert [site.name for site in resolve(model, globs=["0.0", "*"])][:3] == ["0.0", "0", "1"]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("L0.attn_in", ["L0.attn_in"]),
        ("L*.q", ["L0.q", "L1.q"]),
        ("L1.mlp_*", ["L1.mlp_in", "L1.mlp_act", "L1.mlp_out"]),
        ("L1.*", ["L1.attn_out", "L1.mlp_out", "L1.resid_post"]),
        ("module:model.layers.0.self_attn", ["L0.attn_out"]),
        ("module:model.layers.0.mlp.act_fn", ["module:model.layers.0.mlp.act_fn"]),
        ("module:*.1.mlp.down_proj", ["module:model.layers.1.mlp.down_proj"]),
    ],
)
def test_a_rule_names_what_it_takes(glob: str, found: list[str]) -> None:
    model = llama()
    assert [site.name for site in catalogue(model).find(glob)] == found
    default = {site.name for site in resolve(model)}
    assert {site.name for site in resolve(model, globs=[glob])} == default | set(found)


def test_sites_stand_in_order_of_execution() -> None:
    chosen = [site.name for site in resolve(llama(), globs=["L0.?*", "module:model.layers.0.mlp.act_fn"])]
    start, end = chosen.index("L0.resid_pre"), chosen.index("L0.resid_post")
    assert chosen[start : end + 1] == [
        *("L0.resid_pre", "L0.attn_in", "L0.q", "L0.k", "L0.v", "L0.attn_z", "L0.attn_out", "L0.resid_mid"),
        *("L0.mlp_in", "L0.mlp_act", "module:model.layers.0.mlp.act_fn", "L0.mlp_out", "L0.resid_post"),
    ]


@pytest.mark.parametrize(
    ("make", "glob", "message"),
    [
        (llama, "L0.mlp", r"no site matches 'L0\.mlp'; the nearest are .*L0\.mlp_out"),
        (llama, "L*.qq", r"the nearest are L\*\.q, "),
        (llama, "L[0-1].mlp_ac", r"the nearest are L\[0-1\]\.mlp_act, "),
        (llama, "L7.q", r"no site matches 'L7\.q'; the nearest are "),
        (
            mixtral,
            "L*.mlp_act",
            r"'L\*\.mlp_act': the experts of such a layer are one fused module.*; the nearest are ",
        ),
        (llama, "module:model.layers", r"model\.layers is a ModuleList, which is never called"),
        (llama, "model.norm.weight", r"no site matches 'model\.norm\.weight'; the nearest"),
        (llama, "model.rotary_emb", r"is written with `module:` before it; the nearest are module:model\.rotary_emb$"),
        (llama, "module:model.layer.0.mlp", r"the nearest are .*module:model\.layers\.0\.mlp"),
        (
            lambda: build("LlamaModel", "LlamaConfig"),
            "logits",
            r"'logits': this LlamaModel has no module lm_head; the nearest are ",
        ),
        (lambda: build("BertModel", "BertConfig"), "final_norm", "each of its layers ends in a norm of its own"),
        (lambda: build("PhiForCausalLM", "PhiConfig"), "L0.resid_mid", "both read what the layer is given"),
        (
            lambda: build("Olmo2ForCausalLM", "Olmo2Config"),
            "L0.attn_z",
            "where it is in a Olmo2DecoderLayer was never verified; name its module",
        ),
        (nn.Identity, "x", r"no site matches 'x'; the nearest are output"),
        (llama, "L*.attn_weights", r"'L\*\.attn_weights': what queries and keys make of each other stays inside"),
        (llama, "L7.*", r"no site matches 'L7\.\*'; the nearest are "),
    ],
)
def test_what_is_no_site_says_why_and_names_the_nearest(make: Callable[[], nn.Module], glob: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        resolve(make(), globs=[glob])


def test_attach_refuses_before_it_changes_the_model(insitu_records: Recording) -> None:
    model = llama()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"no site matches 'L0\.queries'"):
        insitu.attach(model, to=insitu_records, rules=[insitu.Rule(sites="L0.queries")])
    assert [type(module) for module in model.modules()] == classes


def test_a_layer_with_cross_attention_is_none_of_the_table() -> None:
    config = hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, add_cross_attention=True)
    model = hf.GPT2LMHeadModel(config)
    assert [site.name for site in catalogue(model).sites] == names(INSIDE, ["embed"], ["final_norm", "logits"])
    with pytest.raises(SiteError, match="where it is in a GPT2Block was never verified"):
        resolve(model, globs=["L*.resid_mid"])


def test_axes_can_be_stated() -> None:
    sites = resolve(llama(), {"logits": "samples", "module:model.layers.*.act_fn": "batch"}, ["module:*act_fn"])
    axes = {site.name: site.axis for site in sites}
    assert (axes["logits"], axes["module:model.layers.1.mlp.act_fn"], axes["embed"]) == ("samples", "batch", "tokens")


def test_a_site_that_gives_nothing_comes_off_and_leaves_the_others_of_its_module(insitu_records: Recording) -> None:
    class LlamaDecoderLayer(nn.Module):
        __module__ = "transformers.models.llama.modeling_llama"

        def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
            return None, x * 2

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([LlamaDecoderLayer()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layers[0](x)[1]
            return found

    model = Model()
    classes = [type(module) for module in model.modules()]
    rules = [insitu.Rule(sites="L0.resid_pre", requests="all")]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules) as session:
        for step in range(3):
            model(torch.full((2, 4), float(step)))
        session.flush()
        assert session.coverage().never_fired == ["L0.resid_post"]
    assert [type(module) for module in model.modules()] == classes
    rows = insitu_records.rows("captures", step_id=2)
    assert [torch.frombuffer(bytearray(row["data"]), dtype=torch.float32).tolist() for row in rows] == [[2.0] * 4] * 2


def test_a_module_with_three_sites_is_given_back(insitu_records: Recording) -> None:
    model = mixtral()
    classes = [type(module) for module in model.modules()]
    rules = [insitu.Rule(sites=f"L*.router_{name}", requests="all") for name in ("logits", "weights", "topk")]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules) as session:
        for _ in range(2):
            model(torch.arange(6)[None])
        session.flush()
        assert session.coverage().never_fired == []
    assert [type(module) for module in model.modules()] == classes
    dtypes = {row["site"]: row["dtype"] for row in insitu_records.rows("captures")}
    assert sorted(dtypes.values()) == ["float32", "float32", "float32", "float32", "int64", "int64"]


@given(
    groups=st.integers(1, 4),
    widths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    which=st.integers(0, 2),
    rows=st.integers(0, 3),
)
def test_a_part_is_what_a_reshape_and_a_split_give(groups: int, widths: list[int], which: int, rows: int) -> None:
    run = sum(widths)
    x = torch.arange(rows * groups * run).reshape(rows, groups * run)
    part = Part(run, sum(widths[:which]), sum(widths[: which + 1]))
    pieces = np.split(x.numpy().reshape(rows, groups, run), np.cumsum(widths)[:-1], axis=2)
    assert np.array_equal(part.of(x).numpy(), pieces[which].reshape(rows, groups * widths[which]))


@pytest.mark.parametrize(
    ("glob", "default", "named"),
    [("*", True, True), ("*", False, False), ("L3.*", False, False), ("L3.q", False, True), ("L*.?", False, True)],
)
def test_a_bare_star_means_what_is_tapped_anyway(glob: str, default: bool, named: bool) -> None:
    assert is_named(glob, Site(0, "L3.q", "model.layers.3.self_attn.q_proj", default=default)) is named


def test_module_means_what_modules_return() -> None:
    assert is_named("module:a.b", Site(0, "L0.x", "a.b"))
    for other in (Site(0, "x", "a.b", io="in"), Site(0, "x", "a.b", index=1), Site(0, "x", "a.b", part=Part(3, 0, 1))):
        assert not is_named("module:a.b", other)


def test_a_module_that_ranks_share_out_says_so() -> None:
    sites = {site.name: site.shard for site in resolve(llama(), globs=["module:*.0.mlp.*_proj"])}
    found = {name.rpartition(".")[2]: shard for name, shard in sites.items() if name.startswith("module:")}
    assert found == {"gate_proj": "column", "up_proj": "column", "down_proj": "replicated"}


class _OwnForward(LlamaDecoderLayer):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        found: torch.Tensor = hidden_states + self.mlp(hidden_states)
        return found


class _SameForward(LlamaDecoderLayer):  # type: ignore[misc]
    """As those who quantise or shard a layer make them."""


def test_a_layer_with_a_forward_of_its_own_among_known_ones_keeps_the_sites_of_its_modules() -> None:
    model: Any = llama()
    model.model.layers[1].__class__ = _OwnForward
    found = catalogue(model)
    names = [site.name for site in found.plan()]
    assert names == ["embed", *[f"L{n}.{name}" for n in (0, 1) for name in INSIDE], "final_norm", "logits"]
    assert found.find("L0.resid_mid")
    with pytest.raises(SiteError, match="where it is in a _OwnForward was never verified; name its module"):
        found.find("L1.resid_mid")


def test_a_subclass_that_runs_the_forward_of_a_known_layer_has_all_its_sites() -> None:
    model: Any = llama()
    expected = catalogue(model).sites
    model.model.layers[1].__class__ = _SameForward
    assert catalogue(model).sites == expected


def test_a_layer_that_only_has_the_name_of_a_known_one_is_not_taken_for_it() -> None:
    class LlamaDecoderLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn, self.mlp, self.input_layernorm = nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity()

    model = nn.Module()
    model.layers = nn.ModuleList([LlamaDecoderLayer(), LlamaDecoderLayer()])
    assert [site.name for site in catalogue(model).sites] == names(INSIDE, [], [])


def test_a_site_goes_with_the_rule_that_names_it(insitu_records: Recording) -> None:
    model = llama()
    rules = [insitu.Rule(sites="L0.*", requests="opt-in"), insitu.Rule(sites="L0.q", requests="all")]
    rows = [insitu.Rows("a", start=0, count=3), insitu.Rows("b", start=3, count=1, capture=True)]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules) as session:
        for step in range(2):
            with session.step(step, rows=rows):
                model(torch.arange(4)[None])
    numbers = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    taken: dict[str, list[str]] = {}
    for row in insitu_records.rows("captures", step_id=1):
        taken.setdefault(numbers[row["site"]], []).append(row["request"])
    assert taken == {"L0.q": ["a", "a", "a", "b"], **{f"L0.{name}": ["b"] for name in INSIDE}}
