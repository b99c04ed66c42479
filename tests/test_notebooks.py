"""The shipped notebooks run, show what their text says, and are shipped as they run."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import altair as alt
import numpy as np
import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto
from PIL import Image

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebook", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(notebook: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (kind, content) of everything its cells show."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", [])})
            kind = next(iter(data))
            found.append((kind, data[kind] if isinstance(data[kind], str) else "".join(data[kind])))
    return found


def orange_pixels(picture: bytes) -> int:
    red, green, blue = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).transpose(2, 0, 1)
    return int(((red > 190) & (green > 70) & (green < 120) & (blue < 40)).sum())


def test_where_the_time_went(tmp_path: Path) -> None:
    shipped = json.loads((FOLDER / "where_the_time_went.ipynb").read_text())
    found = shown(runner().executed(shipped, tmp_path))
    (card,) = [content for kind, content in found if kind == "text/html"]
    assert "stage 1 limits the pipeline" in card
    pictures = [base64.b64decode(content) for kind, content in found if kind == "image/png"]
    assert [picture[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"] * 5
    text = "\n".join(content for kind, content in found if kind == "text/plain")
    assert "STAGE_LIMITS" in text
    assert "rank 0  wait_downstream" in text
    assert len(proto.Trace.FromString((tmp_path / "trace.pftrace").read_bytes()).packet) > 1_000
    assert [kind for kind, _ in shown(shipped)] == [kind for kind, _ in found], "run.py writes what its cells show"


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_first_nan_to_layer(tmp_path: Path) -> None:
    shipped = json.loads((FOLDER / "first_nan_to_layer.ipynb").read_text())
    found = shown(runner().executed(shipped, tmp_path))
    (card,) = [content for kind, content in found if kind == "text/html"]
    assert "first non-finite value: rank 1, stage 1, layer 5, L5.mlp_out" in card
    text = "\n".join(content for kind, content in found if kind == "text/plain")
    assert "rank 1, stage 1, layer 5, site L5.mlp_out\n" in text
    assert re.search(r"^rank 1  L5\.attn_out +sum +-?\d+\.\d\d\nrank 1  L5\.mlp_out +sum +nan$", text, re.MULTILINE)
    assert len(re.findall(r": not finite at position \d+$", text, re.MULTILINE)) == 1
    assert "2 of 2 ranks answered." in text
    finite, broken = r"( +-?\d+\.\d\d){6}", r"( +nan){6}"
    assert re.search(
        rf"^L0\.attn_out {finite}(.*\n)+L5\.attn_out {finite} .*\nL5\.mlp_out {broken} ", text, re.MULTILINE
    )
    assert "'layer': 5" in text
    (chart,) = [base64.b64decode(content) for kind, content in found if kind == "image/png"]
    assert orange_pixels(chart) > 1_000, "what is not finite is to be seen"
    assert [kind for kind, _ in shown(shipped)] == [kind for kind, _ in found], "run.py writes what its cells show"


def test_a_mark_that_is_rare_in_a_picture_keeps_its_colour() -> None:
    cells = [
        {"x": x, "y": y, "size": None if (x, y) == (23, 0) else 1.0 + x + 24 * y} for x in range(24) for y in range(22)
    ]
    base = alt.Chart(alt.InlineData(values=cells)).encode(x="x:O", y="y:O")
    blue = base.transform_filter("datum.size !== null").mark_rect().encode(color="size:Q")
    orange = base.transform_filter("datum.size === null").mark_rect(color="#D55E00")
    drawn = runner()._picture((blue + orange).properties(width=640, height=300))
    assert orange_pixels(drawn) > 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_shipped_notebook_is_small_and_was_run_from_top_to_bottom(path: Path) -> None:
    assert path.stat().st_size < 200_000
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_a_cell_that_fails_fails_the_notebook(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "source": ["1 / 0"], "outputs": [], "execution_count": None}
    with pytest.raises(ZeroDivisionError):
        runner().executed({"cells": [cell]}, tmp_path)
