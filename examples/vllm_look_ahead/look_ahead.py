"""Does what insitu traces into a graph fire inside of vLLM? Serves the tiny-llama in cases, and says how each went.

    make vllm-look-ahead                                 every case, in an environment of its own: some ten minutes
    make vllm-look-ahead ARGS='taps-key taps-key-2nd'    these only
    make vllm-look-ahead ARGS='--json'                   one JSON document on stdout

Each case is a process of its own, forked from this one. Cases of one group share a folder of compiled artifacts, in the
order they stand in.
Ends with 1 where a case turned out otherwise than the table says.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from insitu_vllm_look import Asked
from insitu_vllm_plugin import ASKED, KEY, OUT, PIECEWISE, UNKEYED

MODEL: Final = Path(__file__).resolve().parents[1] / "models" / "tiny-llama"
WIDTH: Final = 192
NUM_TOKENS: Final = 12
LENGTHS: Final = (3, 5, 8, 13, 21, 34, 70, 90)
"""Of prompts. The last two are longer than a step may be: they come in chunks."""
DEADLINE_S: Final = 900
SHOWN: Final = ("mode", "pieces", "artifacts", "compile_s", "loaded", "forwards", "log")
"""What the table shows of a case beside what became of it."""

NONE: Final = Asked("")
HOOK: Final = Asked("hook", canaries=(1, 5))
EARLY: Final = Asked("taps", canaries=(0, 1, 2, 3), rows=(1,), width=WIDTH)
LATE: Final = Asked("taps", canaries=(4, 5, 6, 7), rows=(5,), width=WIDTH)
BOTH: Final = Asked("taps", canaries=tuple(range(8)), rows=(1, 5), width=WIDTH)


@dataclass(frozen=True)
class Case:
    """One run of vLLM."""

    name: str
    group: str
    """pieces: vLLM's own backend, as on an accelerator. host: what vLLM does on the host, Inductor. eager."""
    asked: Asked
    expected: str
    """Word of `look_check.Outcome`."""
    is_keyed: bool = True
    loads: bool | None = None
    """Whether it is to run what an earlier process compiled; None: either."""
    num_stages: int = 1

    @property
    def environment(self) -> dict[str, str]:
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))[: self.num_stages]]
        return {
            ASKED: self.asked.text,
            PIECEWISE: "1" if self.group == "pieces" else "",
            UNKEYED: "" if self.is_keyed else "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(cores),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if self.num_stages > 1 else "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


CASES: Final = (
    Case("untapped", "pieces", NONE, "untapped", is_keyed=False, loads=False),
    Case("hook-no-key", "pieces", HOOK, "silent", is_keyed=False, loads=True),
    Case("hook-key", "pieces", HOOK, "fires", loads=False),
    Case("taps-no-key", "pieces", EARLY, "fires", is_keyed=False, loads=False),
    Case("others-no-key", "pieces", LATE, "foreign", is_keyed=False, loads=True),
    Case("taps-key", "pieces", BOTH, "fires", loads=False),
    Case("taps-key-2nd", "pieces", BOTH, "fires", loads=True),
    Case("taps-bf16", "pieces", replace(BOTH, dtype="bfloat16"), "fires", loads=False),
    Case("operator", "pieces", replace(BOTH, operator=True), "differs", loads=False),
    Case("two-stages", "pieces", BOTH, "fires", loads=False, num_stages=2),
    Case("two-stages-2nd", "pieces", BOTH, "fires", loads=True, num_stages=2),
    Case("host-untapped", "host", NONE, "untapped", is_keyed=False),
    Case("host-hook-no-key", "host", HOOK, "fires", is_keyed=False),
    Case("host-taps", "host", BOTH, "fires"),
    Case("host-two-stages", "host", BOTH, "fires", num_stages=2),
    Case("eager", "eager", BOTH, "fires"),
)


def serve(case: Case, out: Path) -> None:
    """Be the process of one case."""
    import numpy as np
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(MODEL),
        dtype=case.asked.dtype,
        enforce_eager=case.group == "eager",
        pipeline_parallel_size=case.num_stages,
        max_model_len=256,
        max_num_batched_tokens=case.asked.max_rows,
        max_num_seqs=len(LENGTHS),
        enable_prefix_caching=False,
        worker_extension_cls="insitu_vllm_plugin.Extension",
        additional_config={KEY: case.asked.digest} if case.is_keyed else {},
    )
    draw = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": draw.integers(5, 2048, length).tolist()} for length in LENGTHS]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
    requests = {
        answer.request_id.partition("-")[0]: [*answer.prompt_token_ids, *answer.outputs[0].token_ids]
        for answer in answers
    }
    reports = [json.loads(report) for report in llm.collective_rpc("insitu_look_report")]
    (out / "found.json").write_text(json.dumps({"requests": requests, "reports": reports}))
    llm.llm_engine.engine_core.shutdown()  # a forked process waits for its children before it lets go of anything


def run(case: Case, scratch: Path) -> dict[str, Any]:
    """Run one case; return its row of the table."""
    out = scratch / case.name
    out.mkdir()
    os.environ["VLLM_CACHE_ROOT"], os.environ[OUT] = str(scratch / case.group), str(out)
    began = time.monotonic()
    code = _forked(case, out, serve)
    row: dict[str, Any] = {"case": case.name, "seconds": round(time.monotonic() - began)}
    if code == 0 and _forked(case, out, hold_against) == 0:
        return {**row, **json.loads((out / "row.json").read_text())}
    said = (out / "log").read_text(errors="replace").splitlines()
    errors = [line for line in said if "Error" in line][:3] or said[-3:]
    return {**row, "as_expected": False, "became": f"ended with {code}", "log": errors}


def _forked(case: Case, out: Path, do: Callable[[Case, Path], None]) -> int | None:
    """Do something in a process of its own, which has imported all that this one has; return its exit code."""

    def be_the_process() -> None:
        os.setsid()
        os.environ.update(case.environment)
        with (out / "log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        do(case, out)

    process = multiprocessing.get_context("fork").Process(target=be_the_process)
    process.start()
    process.join(DEADLINE_S)
    if process.exitcode is None:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def hold_against(case: Case, out: Path) -> None:
    """Write the row of a case that was served."""
    from look_check import Reference, judge

    found = json.loads((out / "found.json").read_text())
    reports = found["reports"]
    outcome = judge(case.asked, found, out, Reference(MODEL, case.asked.dtype))
    loaded = [report["loaded"] > 0 for report in reports]
    row = {
        "mode": reports[0]["mode"],
        **{name: [report[name] for report in reports] for name in ("pieces", "artifacts", "compile_s")},
        "loaded": loaded,
        "forwards": outcome.forwards,
        "became": outcome.word,
        "difference": outcome.difference,
        "as_expected": outcome.word == case.expected and case.loads in (None, all(loaded)),
    }
    (out / "row.json").write_text(json.dumps(row))


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the table for people."""
    told = " ".join(f"{name} {row[name]}" for name in SHOWN if name in row)
    error = f", rows within {row['difference']:.1e}" if row.get("difference") is not None else ""
    mark = "" if row["as_expected"] else "   <-- not as expected"
    return f"{row['case']:<18} {row['seconds']:>4} s  {row['became']}{error}  {told}{mark}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="a folder for logs, rows and artifacts that stays")
    options = parser.parse_args()
    by_name = {case.name: case for case in CASES}
    if unknown := set(options.cases) - by_name.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    import vllm  # noqa: F401  (once for all cases, and nothing is computed here: what threads do does not survive a fork)

    rows = []
    with tempfile.TemporaryDirectory(prefix="insitu-vllm-") as made:
        scratch = Path(options.keep or made)
        scratch.mkdir(parents=True, exist_ok=True)
        for name in options.cases or by_name:
            rows.append(run(by_name[name], scratch))
            if not options.json:
                print(line_of(rows[-1]), flush=True)
    if options.json:
        print(json.dumps(rows, indent=2))
    return 0 if all(row["as_expected"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
