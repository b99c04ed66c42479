"""An architecture of another package gives names to a model that nobody here knows, and to no other."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path

import pytest
import torch
from package_kit import install
from torch import nn

import insitu
from insitu import site_plugins
from insitu.families import Family, Place
from insitu.plugins.discovery import SITES, Broken
from insitu.site_plugins import checked_families
from insitu.sites.catalogue import catalogue
from insitu.testing import Recording, oracle_model

CODE = """
from torch import nn
from insitu.families import Family, Place
from insitu.site_plugins import Architecture

class AcmeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.feed = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.feed(self.mix(x))

class AcmeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Identity()
        self.blocks = nn.ModuleList([AcmeBlock(), AcmeBlock()])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x

PLACES = (Place("resid_pre", io="in"), Place("attn_out", "mix"), Place("mlp_out", "feed"), Place("resid_post"))
NOTHING = {"logits": "it has no head", "final_norm": "it has none"}

class Sites(Architecture):
    def families(self):
        return [
            Family(
                *("Acme", ("AcmeBlock",), PLACES, "blocks", Place("embed", "first"), None),
                absent=NOTHING,
                package="acme_net",
            )
        ]

class Fused(Sites):
    def families(self):
        (family,) = super().families()
        return [Family("Acme", family.layers, (Place("q", "mix", fused="heads"),), "blocks", package="acme_net")]

class Unknown(Sites):
    def families(self):
        return [Family("Acme", ("AcmeBlock",), (Place("gate", "mix"),), "blocks", package="acme_net")]

def broken():
    raise KeyError("table")
"""


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, attribute: str) -> nn.Module:
    """Install the package with an entry point of that name, and return a model of it."""
    monkeypatch.delitem(sys.modules, "acme_net", raising=False)
    install(folder, monkeypatch, "acme_net", {SITES: {"acme": f"acme_net:{attribute}"}}, CODE)
    model: nn.Module = importlib.import_module("acme_net").AcmeNet()
    return model


def test_its_names_are_those_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, insitu_records: Recording
) -> None:
    model = package(tmp_path, monkeypatch, "Sites")
    found = catalogue(model)
    inside = [f"L{layer}.{name}" for layer in (0, 1) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    assert [site.name for site in found.sites] == ["embed", *inside]
    assert found.absent["logits"] == "it has no head"
    with pytest.raises(ValueError, match=r"no site matches 'logits': it has no head"):
        found.find("logits")
    with insitu.attach(model, to=insitu_records, rules=[insitu.Rule(sites="?*")]) as session, torch.inference_mode():
        model(torch.ones(2, 4))
        assert session.coverage().never_fired == []
        assert [site.name for site in session.sites()] == ["embed", *inside]


ALIKE = ["blocks.0.mix", "blocks.0.feed", "blocks.0", "blocks.1.mix", "blocks.1.feed", "blocks.1"]


def test_without_the_package_its_modules_are_its_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = package(tmp_path, monkeypatch, "Sites")
    monkeypatch.setenv("INSITU_PLUGINS_OFF", "acme")
    assert [site.name for site in catalogue(model).sites] == ["first", *ALIKE, "output"]


@pytest.mark.usefixtures("insitu_contains")
@pytest.mark.parametrize(
    ("attribute", "why"),
    [
        ("broken", "KeyError: 'table'"),
        ("Unknown", "Acme has the names gate; those with a meaning are embed"),
        ("Fused", "AttributeError"),
    ],
)
def test_one_that_fails_is_said_once_and_the_model_is_tapped_without(
    attribute: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = package(tmp_path, monkeypatch, attribute)
    for _ in range(3):
        assert [site.name for site in catalogue(model).sites] == ["first", *ALIKE, "output"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "the sites plug-in acme (acme_net 1.0) failed and is switched off; models are tapped without it" in said
    assert why in said
    (known,) = site_plugins._installed(tuple(sys.path), ())
    assert known.guard.num_errors == 1, "it is asked once"


def test_under_pytest_its_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = package(tmp_path, monkeypatch, "broken")
    with pytest.raises(KeyError, match="table"):
        catalogue(model)


def test_packages_are_looked_through_once_and_only_for_a_model_nobody_here_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model, groups = package(tmp_path, monkeypatch, "Sites"), list[str]()

    def scan(group: str) -> EntryPoints:
        groups.append(group)
        return entry_points(group=group)

    monkeypatch.setattr("insitu.plugins.discovery.entry_points", scan)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    catalogue(LlamaForCausalLM(LlamaConfig(vocab_size=8, num_key_value_heads=2, **sizes)))
    assert groups == []
    for _ in range(3):
        catalogue(model)
        catalogue(oracle_model())
    assert groups == [SITES]


def test_what_is_no_family_is_refused() -> None:
    class Odd:
        def families(self) -> list[str]:
            return ["llama"]

    with pytest.raises(Broken, match=r"'llama' is no insitu\.families\.Family"):
        checked_families(Odd())


def test_a_family_holds_layers_of_its_package_only() -> None:
    block = type("Block", (nn.Module,), {"__module__": "acme.models.net"})()
    holding = {"acme": True, "acme.models": True, "acme.models.net": True, "acme.model": False, "transformers": False}
    for package, holds in holding.items():
        assert Family("x", ("Block",), (Place("resid_post"),), package=package).holds(block) is holds
