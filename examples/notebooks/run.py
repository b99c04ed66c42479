"""Execute a notebook from top to bottom and write what its cells show into it.

python examples/notebooks/run.py examples/notebooks/where_the_time_went.ipynb

Cells run in this process, one after the other; the last expression of a cell is what it shows. Charts become PNG, so
that a page that shows notebooks shows them too. Needs vl-convert-python and pillow beside the extra `notebook`.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

Notebook = dict[str, Any]


def executed(notebook: Notebook, folder: Path) -> Notebook:
    """Return the notebook with the outputs of its cells, run in `folder`. Whatever a cell raises goes through."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, number = [], 0
    with contextlib.chdir(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                number += 1
                outputs = _outputs(_text(cell["source"]), number, names)
                cell = {**cell, "execution_count": number, "outputs": outputs}
            cells.append(cell)
    return {**notebook, "cells": cells}


def _outputs(source: str, number: int, names: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    shown = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    if shown is not None:
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append({**result, "data": _shown(shown)})
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if hasattr(value, "to_dict") and hasattr(value, "save"):  # an altair chart
        return {"image/png": base64.b64encode(_picture(value)).decode(), "text/plain": ["a chart"]}
    if hasattr(value, "_repr_html_"):
        return {"text/html": _lines(value._repr_html_()), "text/plain": [type(value).__name__]}
    return {"text/plain": _lines(repr(value))}


def _picture(chart: Any) -> bytes:
    """Return a chart as PNG in few colours, those that differ most: a mark that is rare keeps its own."""
    drawn, small = io.BytesIO(), io.BytesIO()
    chart.save(drawn, format="png")
    few = Image.open(drawn).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(small, format="PNG", optimize=True)
    return small.getvalue()


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = executed(json.loads(path.read_text()), Path(folder))
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    os.replace(part, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
