"""What a statistic of another package promises, tried: parts add up, nothing is changed, nothing read back.

`check_statistic` is for the tests of such a package too (`insitu.testing`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from insitu.plugins.discovery import Broken, Plugin
from insitu.statistic_plugins import Statistic, checked_fields, combined, finalised, measure_of
from insitu.statistics.parts import Floats
from insitu.vocabulary import NAMESPACED

RTOL: Final = 1e-9
"""How far the sum of parts may be off, of the largest number that went into it: float64 sums in another order are
within 1e-12, sums in float32 are not within 1e-8."""
ATOL: Final = 1e-12
DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16)
_ROWS, _WIDTH = 6, 5


def check(plugin: Plugin, _: str | None) -> str:
    """Check an installed statistic: what `insitu plugins check` says."""
    if not NAMESPACED.fullmatch(plugin.name):
        raise Broken(f"its name {plugin.name!r} has no namespace; write it like acme.row_norm")
    return check_statistic(measure_of(plugin.name, plugin).statistic)


def check_statistic(statistic: Statistic) -> str:
    """Return what held of a statistic. Raises Broken, in a sentence, where it breaks a promise, and what it raises."""
    checked_fields(statistic)
    num_splits = 0
    for what, values in _samples():
        for dtype in DTYPES:
            x = torch.from_numpy(values).to(dtype)
            whole = _part(statistic, x, what)
            for cut in range(1, len(x)):
                parts = np.stack([_part(statistic, x[:cut], what), _part(statistic, x[cut:], what)])
                where = f"rows up to {cut} and the rest of {what} in {str(dtype).removeprefix('torch.')}"
                _check_sum(statistic, parts, whole, where)
                num_splits += 1
    _check_grouping(statistic)
    return f"parts add up over {num_splits} splits, in any order; nothing is changed, no value is read back"


def _samples() -> Iterator[tuple[str, Floats]]:
    """Yield matrices of which parts are made, and what they are called."""
    normal = np.random.default_rng(7).normal(size=(_ROWS, _WIDTH))
    wild = normal.copy()
    wild[2, 3], wild[4] = 4096.0, 1e-4
    poisoned = normal.copy()
    poisoned[1, 2] = np.nan
    yield "a normal sample", normal
    yield "a sample with an outlier", wild
    yield "a constant", np.full((_ROWS, _WIDTH), 2.5)
    yield "zeros", np.zeros((_ROWS, _WIDTH))
    yield "one column", normal[:, :1].copy()
    yield "a sample with a NaN", poisoned


def _part(statistic: Statistic, x: torch.Tensor, what: str) -> Floats:
    """Return the part of a tensor, and see to it that computing it left no trace."""
    before, random = x.clone(), torch.get_rng_state()
    with _reading_nothing_back():
        found = statistic.compute(x)
    if not isinstance(found, torch.Tensor) or found.shape != (len(statistic.fields),) or found.is_complex():
        told = f"{found.dtype}{list(found.shape)}" if isinstance(found, torch.Tensor) else repr(found)
        raise Broken(f"compute of {what} gave {told}, not a vector of its {len(statistic.fields)} fields")
    if not torch.equal(torch.get_rng_state(), random):
        raise Broken("compute draws random numbers, which are the model's")
    if not torch.equal(x.nan_to_num(123.0), before.nan_to_num(123.0)):
        raise Broken(f"compute changed the tensor it was given ({what}), which is the model's")
    again = statistic.compute(x)
    if not _is_same(found.double().numpy(), again.double().numpy()):
        raise Broken(f"compute of {what} gave other numbers the second time")
    return found.double().numpy()


@contextmanager
def _reading_nothing_back() -> Iterator[None]:
    """Raise Broken where a value of a tensor decides what the host does next: on a device the model would wait."""

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if _waits(func, args):
                raise Broken(f"compute reads a value back to the host ({func}): on a device the model waits for it")
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        yield


def _waits(func: Any, args: Any) -> bool:
    """Tell whether a host must know values before this operation is over: it returns one, or as many as there are."""
    if func is torch.ops.aten.index.Tensor:  # by places it is as large as they are, by a mask it is not
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _check_sum(statistic: Statistic, parts: Floats, whole: Floats, where: str) -> None:
    first, second = parts[:1].copy(), parts[1:].copy()
    there, back = combined(statistic, first, second), combined(statistic, second, first)
    if not (_is_same(first, parts[:1]) and _is_same(second, parts[1:])):
        raise Broken("combine changed the parts it was given")
    _check_close(statistic, there[0], whole, parts, f"the sum of {where} is not the part of the whole")
    _check_close(statistic, back[0], there[0], parts, f"it matters which comes first, {where}")
    _check_told(statistic, np.concatenate([parts, there]))


def _check_close(statistic: Statistic, found: Floats, expected: Floats, parts: Floats, what: str) -> None:
    for at, name in enumerate(statistic.fields):
        a, b = float(found[at]), float(expected[at])
        sizes = np.abs([b, *parts[:, at], 0.0])
        size = sizes[np.isfinite(sizes)].max()
        if not (_is_same(np.array(a), np.array(b)) or abs(a - b) <= RTOL * size + ATOL):
            raise Broken(f"{what}: {name} is {a!r}, not {b!r}")


def _check_told(statistic: Statistic, parts: Floats) -> None:
    """See to it that what a person reads of a part does not depend on the others beside it."""
    copy = parts.copy()
    together = finalised(statistic, parts)
    if not _is_same(parts, copy):
        raise Broken("finalise changed the parts it was given")
    for at in range(len(parts)):
        alone = finalised(statistic, parts[at : at + 1])
        if alone.keys() != together.keys():
            raise Broken(f"finalise gives {sorted(alone)} of one part and {sorted(together)} of several")
        for name, values in alone.items():
            if not np.allclose(values[0], together[name][at], RTOL, ATOL, equal_nan=True):
                raise Broken(
                    f"finalise gives {name} of a part as {values[0]} alone and {together[name][at]} beside others"
                )


def _check_grouping(statistic: Statistic) -> None:
    """See to it that three parts have one sum, and that many pairs at once are those pairs one by one."""
    samples: Mapping[str, Floats] = dict(_samples())
    names = [name for name in samples if samples[name].shape[1] == _WIDTH]
    parts = np.stack([_part(statistic, torch.from_numpy(samples[name]), name) for name in names])
    first, second, third = parts[:1], parts[1:2], parts[2:3]
    left = combined(statistic, combined(statistic, first, second), third)[0]
    right = combined(statistic, first, combined(statistic, second, third))[0]
    _check_close(statistic, left, right, parts[:3], "(a + b) + c is not a + (b + c)")
    turned = np.roll(parts, 1, 0)
    for at, row in enumerate(combined(statistic, parts, turned)):
        alone = combined(statistic, parts[at : at + 1], turned[at : at + 1])[0]
        _check_close(statistic, row, alone, parts, "a pair beside other pairs has another sum than alone")


def _is_same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))
