"""`examples/07_linear_probe.py`: what it reads back is what the model computed, and its probes learn from it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from corpus import texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from insitu_collector.store import open_store

pytestmark = [pytest.mark.timeout(240), pytest.mark.matrix]

EXAMPLE: Final = Path(__file__).parents[2] / "examples/07_linear_probe.py"
TEXTS: Final = 40
LAYERS: Final = 8


@dataclass(frozen=True)
class Ran:
    store: Path
    plot: Path
    accuracy: dict[str, float]
    """By site, and of always saying what is commoner under `majority`."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("probe")
    store, plot = folder / "store", folder / "probe.svg"
    command = [sys.executable, str(EXAMPLE), "--texts", str(TEXTS), "--store", str(store), "--out", str(plot)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"^(\S+) +(0\.\d{3})", done.stdout, re.MULTILINE)
    return Ran(store, plot, {name: float(share) for name, share in shares})


def test_late_layers_tell_what_is_next_on_texts_no_probe_was_trained_on(ran: Ran) -> None:
    sites = [f"L{layer}.resid_post" for layer in range(LAYERS)]
    assert list(ran.accuracy) == [*sites, "majority"]
    assert 0.5 <= ran.accuracy["majority"] < 0.9
    for site in sites[-3:]:
        assert ran.accuracy[site] > ran.accuracy["majority"] + 0.05
        assert ran.accuracy[site] > ran.accuracy[sites[0]]
    assert "Does the next word begin with a vowel?" in ran.plot.read_text()


def test_what_the_probes_read_is_what_the_model_computed(ran: Ran, model: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    tokenizer = AutoTokenizer.from_pretrained(model)
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = next(text for text in texts(example["SEED"]) if isinstance(text, str))
    ids, ends, vowels = example["labelled"](tokenizer, text)
    words = [tokenizer.decode(ids[at + 1 :])[1:] for at in ends]
    assert [word[0] in "aeiouAEIOU" for word in words] == vowels
    assert len(words) == len(re.findall(r" \w", text))

    with torch.no_grad():
        hidden = decoder(torch.tensor([ids]), output_hidden_states=True).hidden_states
    found = open_store(ran.store).tensors("text-0", "L*.resid_post", torch=True)
    for layer in range(LAYERS - 1):  # transformers gives the last one after its norm
        assert torch.equal(found[f"L{layer}.resid_post"].values, hidden[layer + 1][0])
