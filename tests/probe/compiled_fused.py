"""Compiles the kernels of fused taps for a CUDA device that need not be here; prints what is in their PTX, as JSON.

`test_fused_taps.py` runs it in a process of its own: python compiled_fused.py CAPABILITY.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from insitu.taps import fused_kernel

TYPES = {
    "control": "*i64",
    "table": "*i64",
    "words": "*i64",
    "floats": "*fp32",
    "partial": "*fp32",
    "arrived": "*i32",
    **dict.fromkeys(("num_rows", "width", "stride_row", "stride_col", "site"), "i32"),
}
WIDE = re.compile(r"ld\.global\S*\.(v[48]|v2\.b64|v2\.u64)")
EVEN = ("x", "width", "stride_row")


def compiled(kernel: Any, capability: int, dtype: str, kept: str | None, columns: int, is_even: bool) -> str:
    """Return the PTX of a kernel as a launch would compile it."""
    constants: dict[str, Any] = {
        "IS_BOUNDARY": True,
        "HAS_ROWS": kept is not None,
        "BLOCK_ROWS": max(1, 2048 // columns),
        "BLOCK_COLS": columns,
        "MAX_PROGRAMS": fused_kernel.MAX_PROGRAMS,
    }
    if kept is None:
        constants |= {"dest": None, "kept": None}
    if is_even:
        constants["stride_col"] = 1
    types = {**TYPES, "x": f"*{dtype}", "dest": "*i64", "kept": f"*{kept}"}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in EVEN} if is_even else {},
    )
    options = {"num_warps": 4 if columns <= 2048 else 8}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    return ptx


def look(ptx: str) -> dict[str, int]:
    """Count what matters."""
    return {
        "entries": ptx.count(".visible .entry"),
        "float_atomics": len(re.findall(r"(atom|red)\.\S*\.f(16|32|64)", ptx)),
        "ordered_arrivals": len(re.findall(r"atom\.\S*acq_rel\S*\.add\.[su]32", ptx)),
        "wide_loads": len(WIDE.findall(ptx)),
    }


def main() -> None:
    capability = int(sys.argv[1])
    kernels = {
        "even bf16, wide": (fused_kernel.EVEN, "bf16", None, 4096, True),
        "even fp32, kept as bf16": (fused_kernel.EVEN, "fp32", "bf16", 1024, True),
        "even fp16, narrow": (fused_kernel.EVEN, "fp16", "fp16", 64, True),
        "odd bf16": (fused_kernel.ODD, "bf16", "bf16", 64, False),
        "odd fp64": (fused_kernel.ODD, "fp64", None, 8, False),
        "odd i1": (fused_kernel.ODD, "i1", None, 8, False),
    }
    found = {}
    for name, (kernel, dtype, kept, columns, is_even) in kernels.items():
        found[name] = look(compiled(kernel, capability, dtype, kept, columns, is_even))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
