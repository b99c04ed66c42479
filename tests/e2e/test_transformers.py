"""The checkpoint through `transformers`, attached in one line: a NaN is named by site, layer and step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import insitu
from insitu.vocabulary import IntervalClass, RequestEvent
from insitu_collector.store import open_store

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(240)


def stalls(store: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "insitu", "stalls", str(store), "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize("layer", [0, 5])
def test_the_first_bad_layer_is_named(tmp_path: Path, model: Path, layer: int) -> None:
    decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(model)("One morning, Tom", return_tensors="pt")
    with torch.inference_mode():
        before = decoder(**prompt).logits
    session = insitu.attach(decoder, to=f"file://{tmp_path}")
    with torch.inference_mode():
        assert torch.equal(decoder(**prompt).logits, before), "bit-identical, attached"
        decoder.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    good = decoder.model.layers[layer].mlp.down_proj.weight.detach().clone()
    with torch.no_grad():
        decoder.model.layers[layer].mlp.down_proj.weight[3, 7] = float("nan")
        decoder(**prompt)
        decoder.model.layers[layer].mlp.down_proj.weight.copy_(good)
    bad_step = 9
    with torch.inference_mode():
        decoder(**prompt)
    assert session.coverage().never_fired == []
    session.close()
    with torch.inference_mode():
        assert torch.equal(decoder(**prompt).logits, before), "bit-identical, detached"

    (verdict,) = stalls(tmp_path)["verdicts"]
    assert (verdict["kind"], verdict["site"], verdict["layer"]) == ("first_nonfinite", f"L{layer}.mlp_out", layer)
    assert verdict["step"] == bad_step
    assert len(open_store(tmp_path).table("steps")) == 11


def test_generate_tells_whose_rows_and_code_when_a_request_came_and_ended(tmp_path: Path, model: Path) -> None:
    decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(model)("One morning, Tom", return_tensors="pt")
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    session = insitu.attach(decoder, to=f"file://{tmp_path}")
    decoder.generate(**prompt, **greedy)
    with session.requests(["bob"]):
        decoder.generate(**prompt, **greedy)
    session.request("arrived", "alice", num_tokens=prompt["input_ids"].shape[1])
    with session.requests(["alice"]):
        decoder.generate(**prompt, **greedy)
    session.request("finished", "alice", num_tokens=8)
    session.close()

    told = open_store(tmp_path).table("requests").to_pylist()
    assert [(row["request"], RequestEvent(row["event"])) for row in told] == [
        ("alice", RequestEvent.ARRIVED),
        ("alice", RequestEvent.FINISHED),
    ]
    report = stalls(tmp_path)["requests"]
    assert (report["num_requests"], report["num_without_arrival"], report["num_open"]) == (3, 2, 2)
    assert report["slowest"]["request"] == "alice" and report["end_to_end_s"]["p50"] > 0
    assert report["seconds"]["prefill"] > 0 and report["seconds"]["decode"] > 0


@pytest.mark.parametrize(
    "name", ["01_attach_plain.py", "02_attach_transformers.py", "05_generate.py", "06_generate_batch.py"]
)
def test_the_examples_run_as_shown(tmp_path: Path, model: Path, name: str) -> None:
    example = ROOT / "examples" / name
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "pending=0, dropped=0" in done.stdout
    document = stalls(tmp_path / "insitu-store")
    if name.startswith("05"):
        assert "'request': 'farmer'" in done.stdout and "'request': 'tom'" in done.stdout
    if name.startswith("06"):
        assert "0 {" in done.stdout and "'req_0'" in done.stdout
    if name.startswith("02"):
        assert document["verdicts"][0]["site"] == "L5.mlp_out"


def test_the_example_of_a_pipeline_runs_as_shown(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "examples" / "09_pipelining.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pending=0, dropped=0") == 2
    store = open_store(tmp_path / "insitu-store")
    assert len(store.table("steps")) == 2 * (1 + 20 * 4)
    waits = [row for row in store.table("intervals").to_pylist() if row["cls"] == IntervalClass.RECV_WAIT]
    assert {(row["rank"], row["peer"]) for row in waits} == {(1, 0)}
    assert len(waits) >= 20 * 4
    shown = {(spent["stage"], spent["class"]) for spent in stalls(tmp_path / "insitu-store")["ledger"]}
    assert (1, "wait_upstream") in shown
