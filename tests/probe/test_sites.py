"""Sites have canonical names on known architectures and module paths elsewhere."""

import pytest
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from insitu.sites import SiteError, require, resolve


def llama() -> nn.Module:
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    )
    return model


def gpt2() -> nn.Module:
    model: nn.Module = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32))
    return model


def bert() -> nn.Module:
    model: nn.Module = BertModel(
        BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32)
    )
    return model


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (llama, ["embed", "L0.attn_out", "L0.mlp_out", "L0.resid_post", "L1.attn_out"]),
        (gpt2, ["embed", "L0.attn_out", "L0.mlp_out", "L0.resid_post", "L1.attn_out"]),
        (bert, ["embed", "L0.attn_out", "L0.mlp_out", "L0.resid_post", "L1.attn_out"]),
    ],
)
def test_known_architectures_have_canonical_names(make: object, names: list[str]) -> None:
    model = make()  # type: ignore[operator]
    sites = resolve(model)
    assert [site.name for site in sites][:5] == names
    assert [site.number for site in sites] == list(range(len(sites)))
    modules = dict(model.named_modules())
    assert all(site.fqn in modules for site in sites)


def test_a_decoder_ends_in_norm_and_logits_and_its_last_layer_and_logits_are_boundaries() -> None:
    sites = resolve(llama())
    assert [site.name for site in sites][-2:] == ["final_norm", "logits"]
    assert [site.name for site in sites if site.boundary] == ["L1.resid_post", "logits"]


def test_a_stage_without_a_head_hands_on_its_last_layer() -> None:
    model = llama()
    del model.lm_head
    del model.model.norm
    assert [site.name for site in resolve(model) if site.boundary] == ["L1.resid_post"]


def test_any_other_module_has_its_paths_children_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    assert [site.name for site in resolve(model)] == ["0", "1.0", "1.1", "1", "output"]


def test_an_unknown_site_is_answered_with_the_nearest() -> None:
    with pytest.raises(SiteError, match=r"no site matches 'L0\.mlp'; the nearest are .*L0\.mlp_out"):
        require("L0.mlp", resolve(llama()))


def test_axes_can_be_stated() -> None:
    sites = resolve(llama(), {"logits": "samples"})
    assert {site.name: site.axis for site in sites}["logits"] == "samples"
