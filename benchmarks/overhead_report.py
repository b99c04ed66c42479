"""The price in words: one model's result as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from overhead_figures import Result

WHO = ("step", "drain", "shipping", "collector", "judge", "beside the step")


def lines(result: Result) -> Iterator[str]:
    """Yield the report of one model."""
    r = result
    yield (
        f"{r.model}: {r.num_params / 1e6:.1f} M parameters, batch {r.batch}, {r.num_sites} sites,"
        f" detached step {r.step_ms:.2f} ms"
    )
    for heading, ratios in r.ratios.items():
        yield f"  {heading}"
        for ratio in ratios:
            told = r.targets.get(f"{heading}: {ratio.name}", "")
            yield (
                f"    {ratio.name:22} {ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
                f"  {ratio.num_pairs:4d} pairs{'  too wide' if ratio.is_noisy else ''}{told and '  ' + told}"
            )
    yield "  CPU-seconds a rank-second" + " " * 6 + "".join(f"{who:>17}" for who in WHO)
    for variant, shares in r.shares.items():
        yield f"    {variant:27}" + "".join(f"{shares[who]:17.4f}" for who in WHO)
    yield f"    {r.targets['system']}"
    yield "  rows a CPU-second, all processes: " + ", ".join(f"{k} {v:.1f}" for k, v in r.rows_per_cpu_s.items())
    yield "  wait until durable after a block: " + ", ".join(f"{k} {v:.0f} ms" for k, v in r.flush_ms.items())
    yield f"  {_drain(result)}"
    account = r.account
    stored = ", ".join(f"{name} {n}" for name, n in sorted(account.stored.items()))
    yield f"  rows stored, read again: {stored}; {'all that were asked for' if account.closes else 'NOT all'}"
    if not account.closes:
        yield f"    missing {account.missing}, dropped {account.dropped}"
    yield f"  other processes took {r.foreign_share:.1%} of the cores"


def _drain(result: Result) -> str:
    d = result.drain
    if d is None:
        return "steps beside the drain: too few to compare"
    return (
        f"steps beside the drain (T0): {d.num_beside} of {d.num_beside + d.num_alone}, {d.excess_ms:+.2f} ms each;"
        f" share of step time {d.share:.4f} [{d.low:.4f}, {d.high:.4f}]"
    )
