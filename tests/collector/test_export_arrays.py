"""`insitu export --to safetensors` and `npz`: the bits that were captured, in files that others' libraries read."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from query_kit import RUN, WIDTH, Recorder, capture, entry, site, source, step, value

from insitu.cli import insitu
from insitu.row_forms import ITEM_BYTES

PAGE: Final = Path(__file__).parents[2] / "docs/integrations.md"
POSITIONS: Final = 5


def bf16(position: int) -> np.ndarray[Any, Any]:
    """Return bits of bfloat16, a NaN with a payload of its own among them."""
    bits = np.arange(WIDTH, dtype=np.uint16) * 257 + position
    bits[3] = 0x7FC1 + position
    return bits


@pytest.fixture
def store(tmp_path: Path) -> Path:
    recorder = Recorder(tmp_path / "insitu-store")
    recorder.write("sources", [source(7)])
    recorder.write(
        "sites", [site(7, 0, "L0.mlp_out"), site(7, 1, "L1.resid_post", dtype="bfloat16"), site(7, 2, "L2.top")]
    )
    recorder.write("steps", [step(7, 0, [entry("r", 0, POSITIONS)]), step(7, 1, [entry("gap", 0, 3)], dropped=1)])
    of_bf16 = {"dtype": "bfloat16", "shape": [WIDTH]}
    recorder.write("captures", [capture(7, 0, 0, "r", n) for n in range(POSITIONS)])
    recorder.write("captures", [capture(7, 0, 1, "r", n, values=bf16(n), **of_bf16) for n in range(POSITIONS)])
    recorder.write("captures", [capture(7, 0, 2, "r", n, **largest(n)) for n in range(POSITIONS)])
    recorder.write("steps", [step(7, 2, [entry("gap", 3, 2)])])
    recorder.write("captures", [capture(7, 2, 0, "gap", n) for n in (3, 4)])
    recorder.close()
    return recorder.path


def largest(position: int) -> dict[str, Any]:
    """Return two values of a row and their places, as a rule with `topk` keeps them."""
    data = np.array([9.5 + position, 4.25], np.float32).tobytes() + np.array([6, position], np.int32).tobytes()
    return {"values": np.frombuffer(data, np.uint8), "dtype": "float32+int32", "shape": [2]}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(insitu, ["export", *map(str, arguments)])


def test_safetensors_holds_the_bits_that_were_captured(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.safetensors"
    found = run(store, "--to", "safetensors", "--request", "r", "--out", out)
    assert (found.exit_code, found.stdout) == (0, f"{out}\n"), found.output
    tensors = safetensors.torch.load_file(out)
    assert tensors["L0.mlp_out"].dtype == torch.float32
    assert tensors["L0.mlp_out"].numpy().tobytes() == b"".join(value(0, 0, n).tobytes() for n in range(POSITIONS))
    assert tensors["L1.resid_post"].dtype == torch.bfloat16
    bits = tensors["L1.resid_post"].view(torch.uint16).numpy()
    assert bits.tolist() == [bf16(n).tolist() for n in range(POSITIONS)]
    assert tensors["L2.top"].tolist() == [[9.5 + n, 4.25] for n in range(POSITIONS)]
    assert tensors["L2.top.places"].tolist() == [[6, n] for n in range(POSITIONS)]
    assert tensors["L1.resid_post.positions"].tolist() == list(range(POSITIONS))
    with safetensors.safe_open(out, "numpy") as file:
        assert file.metadata() == {"run": RUN, "request": "r", "missing": "{}"}


def test_npz_holds_the_same_values_for_numpy_alone(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.npz"
    found = run(store, "--to", "npz", "--request", "r", "--site", "L[01].*", "--out", out, "--json")
    assert found.exit_code == 0, found.output
    with np.load(out) as file:
        arrays = dict(file)
    assert sorted(arrays) == ["L0.mlp_out", "L0.mlp_out.positions", "L1.resid_post", "L1.resid_post.positions"]
    assert arrays["L0.mlp_out"].tobytes() == b"".join(value(0, 0, n).tobytes() for n in range(POSITIONS))
    as_float32 = np.stack([bf16(n) for n in range(POSITIONS)]).astype(np.uint32) << 16
    assert arrays["L1.resid_post"].dtype == np.float32
    assert arrays["L1.resid_post"].view(np.uint32).tolist() == as_float32.tolist()
    (told,) = json.loads(found.stdout)["files"]
    assert told == {"path": str(out), "bytes": out.stat().st_size, "arrays": 4}


def test_rows_that_were_dropped_make_the_export_partial(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.safetensors"
    found = run(store, "--to", "safetensors", "--request", "gap", "--out", out)
    assert found.exit_code == 5
    assert "rows missing: 3 (dropped)" in found.stderr
    with safetensors.safe_open(out, "numpy") as file:
        assert json.loads(file.metadata()["missing"]) == {"L0.mlp_out": {"dropped": [0, 1, 2]}}
        assert file.get_tensor("L0.mlp_out.positions").tolist() == [3, 4]


def test_what_the_page_says_to_paste_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path / "insitu-store")
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 3, "L3.resid_post")])
    recorder.write("steps", [step(7, 0, [entry("req-1", 0, POSITIONS)])])
    recorder.write("captures", [capture(7, 0, 3, "req-1", n) for n in range(POSITIONS)])
    recorder.close()
    monkeypatch.chdir(tmp_path)
    (_, _, part) = PAGE.read_text().partition("## What researchers take home")
    exec(re.findall(r"```python\n(.*?)```", part, re.DOTALL)[0], {})
    lines = re.findall(r"^insitu (export .*)$", part, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert CliRunner().invoke(insitu, shlex.split(line)).exit_code == 0, line
    whole = b"".join(value(3, 0, n).tobytes() for n in range(POSITIONS))
    assert safetensors.torch.load_file("rows.safetensors")["L3.resid_post"].numpy().tobytes() == whole
    with np.load("rows.npz") as arrays:
        assert arrays["L3.resid_post"].tobytes() == whole


def told() -> dict[str, tuple[str, str]]:
    """Return what docs/integrations.md says of each type: of npz, of safetensors."""
    (table,) = re.findall(r"\| what was captured \|.*?\n\n", PAGE.read_text(), re.DOTALL)
    found: dict[str, tuple[str, str]] = {}
    for line in table.strip().splitlines()[2:]:
        names, npz, tensors = (cell.strip() for cell in line.strip("|").split("|"))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), (npz, tensors))
    return found


def bits_of(dtype: str) -> np.ndarray[Any, Any]:
    """Return a row of 8 values of a type as bytes: any bits there are, but a `bool` is 0 or 1."""
    random = np.random.default_rng(3).integers(0, 256, 8 * ITEM_BYTES[dtype], np.uint8)
    return random % 2 if dtype == "bool" else random


def came_of(store: Path, out: Path, dtype: str) -> str:
    """Return what an export made of a row of a type, in the words of the page."""
    to = out.suffix.removeprefix(".")
    found = run(store, "--to", to, "--request", "r", "--out", out)
    if found.exit_code:
        assert (found.exit_code, found.stdout) == (1, "")
        assert found.stderr.startswith("Error: ") and dtype in found.stderr and len(found.stderr.splitlines()) == 1
        return "refused"
    if to == "npz":
        with np.load(out) as arrays:
            values = torch.from_numpy(arrays["L0.mlp_out"])
    else:
        values = safetensors.torch.load_file(out)["L0.mlp_out"]
    bits = torch.from_numpy(bits_of(dtype))
    if values.dtype == getattr(torch, dtype):
        assert torch.equal(values.view(torch.uint8)[0], bits)
        return "the same bits"
    expected = bits.view(getattr(torch, dtype)).to(torch.float32)
    assert values.dtype == torch.float32 and torch.equal(values[0].isnan(), expected.isnan())
    assert torch.equal(values[0].nan_to_num(), expected.nan_to_num())
    return "the same values"


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_the_page_says_of_each_type_what_comes_of_it(tmp_path: Path, dtype: str) -> None:
    recorder = Recorder(tmp_path / "store")
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "L0.mlp_out", dtype=dtype)])
    recorder.write("steps", [step(7, 0, [entry("r", 0, 1)])])
    recorder.write("captures", [capture(7, 0, 0, "r", 0, values=bits_of(dtype), dtype=dtype, shape=[8])])
    recorder.close()
    found = tuple(came_of(recorder.path, tmp_path / f"rows.{to}", dtype) for to in ("npz", "safetensors"))
    said = told()[dtype]
    assert [word in cell for word, cell in zip(found, said, strict=True)] == [True, True], (found, said)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--to", "npz"), "say which with --request"),
        (("--to", "npz", "--request", "nobody"), "no captured row of request 'nobody'"),
        (("--to", "safetensors", "--request", "r", "--last", "5"), "go with traces and tables"),
        (("--to", "csv", "--request", "r"), "go with safetensors, npz"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    store: Path, tmp_path: Path, arguments: tuple[str, ...], line: str
) -> None:
    out = tmp_path / "out"
    found = run(store, *arguments, "--out", out)
    assert found.exit_code in (1, 2) and found.stdout == ""
    (error,) = [each for each in found.stderr.splitlines() if each.startswith("Error: ")]
    assert line in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["insitu-store"]


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_without_a_package_the_line_names_the_extra(
    store: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    found = run(store, "--to", "safetensors", "--request", "r", "--out", tmp_path / "out")
    assert found.exit_code == 1
    assert found.stderr.splitlines()[-1].endswith("pip install 'insitu[engine]', or --to npz")
