"""The exporter keeps its contract, and a full disk leaves no half of a batch."""

import json
import os
from pathlib import Path

import pytest
import torch
from acme_jsonl import JsonLines
from torch import nn

import insitu
from insitu.check_exporter import batches
from insitu.exporters import Retry
from insitu.identity import Source
from insitu.testing import check_exporter


def test_it_keeps_the_contract(tmp_path: Path) -> None:
    assert check_exporter(JsonLines, f"jsonl://{tmp_path}/records").startswith("took ")


def test_what_a_model_did_is_in_the_files(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with insitu.attach(model, to=f"jsonl://{tmp_path}") as session:
        for _ in range(3):
            model(torch.ones(1, 2))
        report = session.flush()
    assert (report.pending, report.dropped) == (0, 0)
    (file,) = tmp_path.glob("steps-*.jsonl")
    assert [json.loads(line)["step_id"] for line in file.read_text().splitlines()] == [0, 1, 2]


def test_a_full_disk_leaves_no_half_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, (first, second, *_) = JsonLines(f"jsonl://{tmp_path}", Source()), batches()
    exporter.export(first)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(Retry, match="disk_full"):
            exporter.export(second)
    assert file.read_bytes() == before
    exporter.export(second)
    assert len(file.read_bytes()) > len(before)
