"""Every place in the table of architectures, against what transformers itself computes in a small model of each class.

Each site is compared twice: with what a forward hook on its module saw, which shows that the right tensor was taken,
and with what its name means: hidden states, queries and values that reach the attention function, and the sums and
norms between them. All in float64 with random weights, so that what is almost right is far off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CASES, ENCODER, LAYERS, WIDTH, Case, built, causal, random_model
from torch import nn
from transformers.modeling_utils import AttentionInterface

import insitu
from insitu.sites.architectures import FAMILIES
from insitu.sites.catalogue import catalogue
from insitu.sites.site import Site
from insitu.testing import Recording

RTOL, ATOL = 1e-9, 1e-12
"""Of sums of a few float64 numbers in another order."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the rows of two steps, not for those of hundreds."""
    monkeypatch.setattr("insitu.slabs.rows.MAX_SLABS", 2)


def after(layer: nn.Module, *norms: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that runs some modules of a layer one after the other."""

    def run(x: torch.Tensor) -> torch.Tensor:
        for norm in norms:
            x = layer.get_submodule(norm)(x)
        return x

    return run


@dataclass
class Seen:
    """What transformers computed in one run: tensors by module, and what the attention function was given and gave."""

    given: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    returned: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    attention: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    outputs: Any = None

    def watch(self, fqn: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.given[fqn] = [x.clone() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            found = output if isinstance(output, tuple) else (output,)
            self.returned[fqn] = [x.clone() for x in found if isinstance(x, torch.Tensor)]

        return hook


def observe(model: nn.Module, case: Case, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Run a model that nothing of ours touches, and return what it computed."""
    seen, interface = Seen(), AttentionInterface.get_interface
    paths = {id(module): fqn for fqn, module in model.named_modules()}

    def spied(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        attend = interface(self, *args, **kwargs)

        def spy(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            found = attend(module, query, key, value, *args, **kwargs)
            rows = {"q": query, "k": key, "v": value}
            by_head = {name: x.transpose(1, 2).clone() for name, x in rows.items()}
            seen.attention[paths[id(module)]] = {**by_head, "attn_z": found[0].clone()}
            return found

        return spy

    handles = [module.register_forward_hook(seen.watch(fqn), with_kwargs=True) for fqn, module in model.named_modules()]
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(AttentionInterface, "get_interface", spied)
        more = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
        seen.outputs = model(**case.inputs, output_hidden_states=True, **more)
    for handle in handles:
        handle.remove()
    return seen


def captured(model: nn.Module, case: Case, records: Recording) -> tuple[dict[str, torch.Tensor], dict[str, Site]]:
    """Return the rows of every site there is [rows, width], by name, and the sites. Nothing changes for the model."""
    sites = {site.name: site for site in catalogue(model).sites}
    dtype = next(model.parameters()).dtype
    rules = [insitu.Rule(sites="?*", requests="all")]
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs.items()}
    classes = [type(module) for module in model.modules()]
    with torch.inference_mode():
        bare = model(**inputs)[0]
    with torch.inference_mode(), insitu.attach(model, to=records, rules=rules, max_rows=16) as session:
        for _ in range(2):  # widths are learned in the first
            assert torch.equal(model(**inputs)[0], bare)
        session.flush()
        assert session.coverage().never_fired == []
        assert session.stats().dropped == {}
        assert [site.name for site in session.sites()] == list(sites)
        numbers = {site.number: site.name for site in session.sites()}
    assert [type(module) for module in model.modules()] == classes
    rows: dict[str, list[np.ndarray[Any, Any]]] = {}
    for row in records.rows("captures", step_id=1):
        assert row["dtype"] == sites[numbers[row["site"]]].dtype, numbers[row["site"]]
        kind = np.int16 if row["dtype"] == "bfloat16" else row["dtype"]
        rows.setdefault(numbers[row["site"]], []).append(np.frombuffer(row["data"], kind))
    return {name: torch.from_numpy(np.stack(found)) for name, found in rows.items()}, sites


def flat(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.reshape(-1, width)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(flat(a, a.shape[-1]), flat(b, a.shape[-1]), check_dtype=False, rtol=RTOL, atol=ATOL)


class Model:
    """One case, run by transformers and observed by insitu."""

    def __init__(self, case: Case, records: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
        self.case = case
        self.model = random_model(case, torch.float64)
        self.seen = observe(self.model, case, monkeypatch)
        self.rows, self.sites = captured(self.model, case, records)

    def stacks(self) -> list[tuple[str, Any]]:
        """Return the stacks of layers: what their names begin with, and transformers' hidden states."""
        outputs = self.seen.outputs
        if "encoder_hidden_states" in outputs:
            return [("encoder.", outputs.encoder_hidden_states), ("decoder.", outputs.decoder_hidden_states)]
        return [("", outputs.hidden_states)]

    def layer(self, prefix: str, number: int) -> tuple[Layer, nn.Module]:
        fqn = self.sites[f"{prefix}L{number}.resid_post"].fqn
        return Layer(self, f"{prefix}L{number}."), self.model.get_submodule(fqn)


@dataclass(frozen=True)
class Layer:
    """The rows of one layer's sites, by their short names."""

    of: Model
    prefix: str

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.of.rows[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.of.rows

    def site(self, name: str) -> Site:
        return self.of.sites[self.prefix + name]

    def module(self, name: str) -> nn.Module:
        return self.of.model.get_submodule(self.site(name).fqn)


@pytest.fixture(params=CASES, ids=lambda case: f"{case.layer}-{len(case.absent)}")
def run(request: pytest.FixtureRequest, insitu_records: Recording, monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(request.param, insitu_records, monkeypatch)


def test_every_site_is_what_transformers_says(run: Model) -> None:
    assert run.rows.keys() == run.sites.keys()
    _each_is_what_its_module_was_given_or_returned(run)
    _the_stream_is_the_hidden_states(run)
    for prefix, states in run.stacks():
        for number in range(len(states) - 1):
            rows, layer = run.layer(prefix, number)
            _attention_is_that_of_its_function(run, rows)
            _sums_and_norms_lead_from_place_to_place(run.case, rows, layer)
            if "router_logits" in rows:
                _routers_choose_what_they_score_highest(run, rows, number)
    _names_that_are_absent_have_a_reason(run)


def _each_is_what_its_module_was_given_or_returned(run: Model) -> None:
    for name, site in run.sites.items():
        tensors = (run.seen.given if site.io == "in" else run.seen.returned)[site.fqn]
        expected = flat(tensors[site.index], tensors[site.index].shape[-1])
        if site.part is None:
            assert torch.equal(run.rows[name], expected), name


def _the_stream_is_the_hidden_states(run: Model) -> None:
    for prefix, states in run.stacks():
        assert len(states) == LAYERS + 1
        assert torch.equal(run.rows[f"{prefix}embed"], flat(states[0], WIDTH))
        for number in range(LAYERS):
            rows, _ = run.layer(prefix, number)
            assert torch.equal(rows["resid_pre"], flat(states[number], WIDTH))
            if number < LAYERS - 1 or not run.case.tied:
                assert torch.equal(rows["resid_post"], flat(states[number + 1], WIDTH))
        last = run.layer(prefix, LAYERS - 1)[0]["resid_post"]
        if f"{prefix}final_norm" in run.rows:
            norm = run.model.get_submodule(run.sites[f"{prefix}final_norm"].fqn)
            same(norm(last), run.rows[f"{prefix}final_norm"])
            if run.case.tied:
                same(run.rows[f"{prefix}final_norm"], states[-1])
        else:
            same(after(run.model, *run.case.tail)(last), states[-1])
    cap = getattr(run.model.config, "final_logit_softcapping", None)
    logits = run.rows["logits"]
    same(torch.tanh(logits / cap) * cap if cap else logits, run.seen.outputs.logits)


def _attention_is_that_of_its_function(run: Model, rows: Layer) -> None:
    _attend(run, rows, {"q": "q", "k": "k", "v": "v", "attn_z": "attn_z"})
    if "cross_q" in rows:
        _attend(run, rows, {"cross_q": "q", "cross_z": "attn_z"})


def _attend(run: Model, rows: Layer, names: Mapping[str, str]) -> None:
    first = rows.site(next(iter(names))).fqn
    (path,) = [path for path in run.seen.attention if first.startswith(f"{path}.")]
    module = run.model.get_submodule(path)
    for name, of_function in names.items():
        expected = run.seen.attention[path][of_function]  # [batch, tokens, heads, width of a head]
        found = rows[name].reshape(expected.shape)
        if of_function == "q":
            found = found * run.case.scale
        norm = getattr(module, f"{of_function}_norm", None)
        found = found if norm is None else norm(found)
        if run.case.rotated and of_function in ("q", "k"):
            # Position 0 is not turned; ModernBERT turns in float32, so that is what can be compared, to the bit.
            assert torch.equal(found[:, 0].float(), expected[:, 0].float()), name
            torch.testing.assert_close(found.norm(dim=-1), expected.norm(dim=-1), rtol=1e-6, atol=0)  # cos is float32
        else:
            torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)


def _sums_and_norms_lead_from_place_to_place(case: Case, rows: Layer, layer: nn.Module) -> None:
    at = "resid_pre"
    same(after(layer, *case.attn_norm)(rows["resid_pre"]), rows["attn_in"])
    projected = rows.module("q")(rows["attn_in"])
    part = rows.site("q").part
    same(projected if part is None else part.of(projected), rows["q"])
    same(after(layer, *case.attn_after)(rows.module("attn_z")(rows["attn_z"])), rows["attn_out"])
    if "resid_mid" in rows:
        same(rows["resid_pre"] + rows["attn_out"], rows["resid_mid"])
        at = "resid_mid"
    if "cross_out" in rows:
        same(layer.get_submodule("layer.1.layer_norm")(rows["resid_mid"]), rows["cross_in"])
        same(rows.module("cross_q")(rows["cross_in"]), rows["cross_q"])
        same(rows.module("cross_z")(rows["cross_z"]), rows["cross_out"])
        same(rows["resid_mid"] + rows["cross_out"], rows["resid_cross"])
        at = "resid_cross"
    mlp_norm = [path.replace("layer.-1", f"layer.{2 if at == 'resid_cross' else 1}") for path in case.mlp_norm]
    same(after(layer, *mlp_norm)(rows[at]), rows["mlp_in"])
    if "mlp_act" in rows:
        same(after(layer, *case.mlp_after)(rows.module("mlp_act")(rows["mlp_act"])), rows["mlp_out"])
    stream = rows["mlp_in"] if case.end_norm else rows[at]
    total = stream + rows["mlp_out"] + (rows["attn_out"] if at == "resid_pre" else 0)
    same(after(layer, *case.end_norm)(total), rows["resid_post"])


def _routers_choose_what_they_score_highest(run: Model, rows: Layer, number: int) -> None:
    logits, chosen, weights = rows["router_logits"], rows["router_topk"], rows["router_weights"]
    routed = [layer for layer in range(LAYERS) if f"L{layer}.router_logits" in run.rows]
    assert torch.equal(logits, run.seen.outputs.router_logits[routed.index(number)])
    assert torch.equal(chosen, logits.topk(chosen.shape[1]).indices)
    shares = logits.float().softmax(-1).gather(1, chosen)
    normed = getattr(rows.module("router_logits"), "norm_topk_prob", True)
    expected = shares / shares.sum(1, keepdim=True) if normed else shares
    torch.testing.assert_close(weights.float(), expected)


def _names_that_are_absent_have_a_reason(run: Model) -> None:
    absent = catalogue(run.model).absent
    short = {name.rpartition(".")[2] for name in absent if ":" not in name}
    here = {name.rpartition(".")[2] for name in run.sites}
    assert short - here == run.case.absent
    assert all(absent.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.layer}-{len(case.absent)}")
def test_dtypes_are_those_that_are_captured(case: Case, insitu_records: Recording) -> None:
    model = random_model(case, torch.bfloat16)
    rows, sites = captured(model, case, insitu_records)  # compares each row's dtype with its site's
    assert rows.keys() == sites.keys()
    assert {site.dtype for site in sites.values()} <= {"bfloat16", "float32", "int64"}


def test_shards_follow_the_plan_of_transformers() -> None:
    shards = {site.name: site.shard for site in catalogue(causal("Llama")()).sites if site.layer in (0, None)}
    divided = {"L0.q": "head", "L0.k": "head", "L0.v": "head", "L0.attn_z": "head", "L0.mlp_act": "column"}
    assert {name: shard for name, shard in shards.items() if shard != "replicated"} == divided
    gathered = {site.shard for site in catalogue(causal("Phi3")()).sites}
    assert gathered == {"replicated"}, "its fused projections are gathered before they are cut"


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "ModernBert"])
def test_the_head_of_an_encoder_that_classifies_is_logits(kind: str, insitu_records: Recording) -> None:
    case = Case("", built(f"{kind}ForSequenceClassification", f"{kind}Config", **ENCODER))
    model = random_model(case, torch.float64)
    with torch.inference_mode():
        expected = model(**case.inputs).logits
    rows, sites = captured(model, case, insitu_records)
    assert torch.equal(rows["logits"], expected)
    assert (sites["logits"].axis, sites["logits"].boundary) == ("batch", sites["logits"].default)


def test_every_class_in_the_table_was_tried() -> None:
    tried = [(case.layer, family.title) for case in CASES for family in FAMILIES if _is_of(case, family.layers, family)]
    assert {layer for layer, _ in tried} == {layer for family in FAMILIES for layer in family.layers}
    assert {title for _, title in tried} == {family.title for family in FAMILIES}


def _is_of(case: Case, layers: tuple[str, ...], family: Any) -> bool:
    return case.layer in layers and any(family.holds(module) for module in case.make().modules())
