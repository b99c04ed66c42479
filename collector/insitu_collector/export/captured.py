"""Captured rows of one request as a file of arrays: safetensors, or NumPy's .npz."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from insitu_collector.query.tensors import DROPPED, PART_MISSING, SiteTensor

ARRAYS: Final = {"safetensors": ".safetensors", "npz": ".npz"}
"""Formats that hold a file of arrays, and how it is called."""
LOST: Final = (DROPPED, PART_MISSING)
"""Why positions are missing that were to be taken. The others no rule asked for, or no step computed."""


def write_arrays(found: Mapping[str, SiteTensor], request: str, run: str, path: Path, to: str) -> int:
    """Write the values of each site under its name [positions, width], and `<site>.positions` int64[positions].

    Where only the largest values of each row were kept, `<site>.places` int32[positions, k] as well. found: of torch
    for safetensors, of numpy for npz. Returns the number of arrays. Raises ValueError for a type that the format has
    not, ModuleNotFoundError.
    """
    arrays: dict[str, Any] = {}
    for site, captured in found.items():
        arrays[site] = captured.values
        arrays[f"{site}.positions"] = captured.positions
        if captured.places is not None:
            arrays[f"{site}.places"] = captured.places
    if to == "npz":
        with path.open("wb") as file:  # by name, numpy would put .npz after it
            np.savez(file, **arrays)
    else:
        missing = {site: captured.missing for site, captured in found.items() if captured.missing}
        _write_safetensors(arrays, {"run": run, "request": request, "missing": json.dumps(missing)}, path)
    return len(arrays)


def _write_safetensors(arrays: Mapping[str, Any], metadata: dict[str, str], path: Path) -> None:
    import safetensors.torch
    import torch

    tensors = {
        name: array.contiguous() if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
        for name, array in arrays.items()
    }
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except KeyError as error:  # it looks types up in a table of its own
        kind = str(error).removeprefix("torch.")
        raise ValueError(f"safetensors has no type {kind}; --to npz may have it (docs/integrations.md)") from None


def missing_of(found: Mapping[str, SiteTensor]) -> tuple[dict[str, int], list[str]]:
    """Return rows that were lost, by reason, and sentences about what else is not in the file or not alike."""
    counted: Counter[str] = Counter()
    notes = []
    for site, captured in found.items():
        counted.update({reason: len(positions) for reason, positions in captured.missing.items()})
        if captured.unlike:
            notes.append(f"{site}: ranks that hold it whole differ at {len(captured.unlike)} positions")
    notes += [f"{rows} rows are not in it: {reason}" for reason, rows in sorted(counted.items()) if reason not in LOST]
    return {reason: rows for reason, rows in counted.items() if reason in LOST}, notes
