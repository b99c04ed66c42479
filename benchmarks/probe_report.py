"""What `make bench-probe` has measured, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from overhead_figures import Cost, Ratio
from probe_results import Steps, Stored, of_ratio, sampled_share


def cost_lines(costs: Sequence[Cost], targets: Mapping[str, str]) -> Iterator[str]:
    """Yield the smallest parts."""
    yield "what the smallest parts take, one thread"
    for each in costs:
        told = targets.get(each.name, "")
        yield (
            f"  {each.name:50} {each.median_ns / 1e3:8.3f} us [{each.low_ns / 1e3:.3f}, {each.high_ns / 1e3:.3f}]"
            f"  {each.num_rounds} rounds{told and '  ' + told}"
        )


def step_lines(result: Steps, targets: Mapping[str, str]) -> Iterator[str]:
    """Yield what steps of one model pay."""
    yield (
        f"{result.model}, {result.mode}: step by step in memory, batch {result.batch}, {result.num_sites} sites,"
        f" detached step {result.step_ms:.2f} ms; time over detached"
    )
    yield from _ratio_lines(result.ratios, result.cpu_ratios, targets)
    for each in result.costs:
        yield f"  {each.name}: {each.median_ns / 1e3:.2f} us [{each.low_ns / 1e3:.2f}, {each.high_ns / 1e3:.2f}]"
    for name, told in result.sampled.items():
        if told["untaken"]:
            yield f"  {name}: statistics of {told['untaken']} sites found no place: those steps cost less"
    yield from _last_lines(result.checks, result.foreign_share)


def stored_lines(result: Stored, targets: Mapping[str, str]) -> Iterator[str]:
    """Yield what it costs one model to keep things."""
    what = "decode-like" if result.tokens == 1 else f"prompts of {result.tokens}"
    yield (
        f"{result.model}, {result.mode}: stored durably, {what}, batch {result.batch}, blocks of"
        f" {result.steps_a_block} steps ({result.block_ms:.0f} ms detached); throughput over detached"
    )
    yield from _ratio_lines(result.ratios, result.cpu_ratios, targets)
    if (share := sampled_share(result)) is not None:
        yield f"  statistics were taken in {share:.3f} of the steps"
    for name, why in result.unable.items():
        yield f"  could not run: {name}: {why}"
    yield from _last_lines(result.checks, result.foreign_share)


def _ratio_lines(ratios: Sequence[Ratio], cpu: Sequence[Ratio], targets: Mapping[str, str]) -> Iterator[str]:
    for ratio in ratios:
        beside, told = of_ratio(cpu, ratio.name), targets.get(ratio.name, "")
        yield (
            f"    {ratio.name:56} {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
            + (f"  CPU {beside.median:.4f} [{beside.low:.4f}, {beside.high:.4f}]" if beside else "")
            + f"  {ratio.num_pairs} pairs{'  wide' if ratio.is_noisy else ''}{told and '  ' + told}"
        )


def _last_lines(checks: Mapping[str, Any], foreign_share: float) -> Iterator[str]:
    for name, check in checks.items():
        if not check["num_compared"]:
            continue
        same = "the same bits" if check["same_bits"] else f"off by {check['off']:.1e} of the largest value at most"
        yield (
            f"  on the disk, {name}: {check['found']} of {check['expected']} rows,"
            f" {check['num_compared']} compared: {same}{'' if check['holds'] else '  WRONG'}"
        )
    yield f"  other processes took {foreign_share:.1%} of the cores"
