"""`insitu plan` says what rules take and cost before they do, and is right where it can be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from small_models import CASES, Case, random_model
from transformers import AutoModelForCausalLM

import insitu
from insitu.cli import insitu as command
from insitu.plan import costs as plan_costs
from insitu.plan.shapes import shapes_of
from insitu.sites.catalogue import catalogue
from insitu.slabs.rows import ROW_BUDGET_BYTES
from insitu.statistics.workspace import ELEMENT_BYTES
from insitu.testing import Recording

BATCH, PROMPT, MAX_ROWS = 4, 24, 32
TRAFFIC = ("--batch", str(BATCH), "--prompt", str(PROMPT), "--max-rows", str(MAX_ROWS))
RULES = (
    "L*.resid_post,requests=all,rows=last,cast=bf16",
    "logits,requests=all,topk=8",
    "L[0-3].*,take=summary,every=1",
)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(command, ["plan", *map(str, args)])


def rules_of(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--rule", text)]


def planned(*args: str | Path) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["schema"] == "insitu.plan/1"
    return found


@pytest.fixture(autouse=True)
def budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long these steps take, the governor leaves none out."""
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "1")


@pytest.fixture
def _tap_of_10_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings of a busy machine are nobody's: each kind of tap is taken to cost 10 us."""
    monkeypatch.setattr(plan_costs, "_best_of", lambda call: 10_000)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A checkpoint without its weights."""
    shutil.copy(model / "config.json", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("_tap_of_10_us")
def test_a_person_reads_a_line_a_rule(folder: Path) -> None:
    result = run(folder, *rules_of(*RULES))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("LlamaForCausalLM: 27 of 99 sites tapped. An estimate of one rank, at")
    assert [line.split()[:2] for line in lines[4:7]] == [
        [RULES[0], "8"],
        [RULES[1], "1"],
        ["L[0-3].*,take=summary,every=1", "12"],
    ]
    assert lines[-1].startswith("  estimate: (30 us a step + "), "how it was made stands beside the share"
    assert lines[-2].startswith("step time: about ")


def test_bytes_are_those_that_such_steps_leave(model: Path, folder: Path, insitu_records: Recording) -> None:
    found = planned(folder, *TRAFFIC, *rules_of(*RULES))
    decoder = AutoModelForCausalLM.from_pretrained(model).eval()
    rules = [insitu.Rule(sites="L*.resid_post", requests="all", rows="last", cast="bf16")]
    rules += [insitu.Rule(sites="logits", requests="all", topk=8)]
    rules += [insitu.Rule(sites="L[0-3].*", take="summary", every=1)]
    options: dict[str, Any] = {"max_rows": MAX_ROWS, "axes": {"logits": "samples"}}
    with torch.inference_mode(), insitu.attach(decoder, to=insitu_records, rules=rules, **options) as session:
        with session.step(0, num_rows=BATCH):
            decoder(torch.ones((BATCH, 1), dtype=torch.int64))
        for step in range(1, 40):
            rows = [insitu.Rows(f"request-{at}", at, 1, 30, "decode", sample_row=at) for at in range(BATCH)]
            with session.step(step, rows=rows):
                decoder(torch.ones((BATCH, 1), dtype=torch.int64))
        observer = session._observer
        assert observer is not None and observer.row_slabs is not None and observer.statistic_slabs is not None
        memory = found["memory_bytes"]
        assert memory["steps"] == observer.plan.num_slabs * observer.plan.slab_bytes
        assert (memory["rows"], memory["row_slabs"]) == (observer.row_slabs.num_bytes, observer.row_slabs.ring.size)
        slabs, staging = observer.statistic_slabs, observer.taps.statistics._staging
        assert staging is not None
        computed = ELEMENT_BYTES * slabs.work.size + staging.num_bytes
        assert memory["statistics"] == slabs._ints.nbytes + slabs._floats.nbytes + computed
    stored = {name: insitu_records.table(name).nbytes for name in ("captures", "statistics", "summaries", "steps")}
    rows, logits, summary = (rule["step_bytes"]["decode"] for rule in found["rules"])
    assert stored["captures"] / 39 == pytest.approx(rows + logits, rel=0.1)
    assert stored["statistics"] / 40 == pytest.approx(summary, rel=0.1)
    intervals = insitu_records.table("intervals")
    always = stored["summaries"] / 40 + stored["steps"] / 40 + 4 * intervals.nbytes / intervals.num_rows
    assert always == pytest.approx(found["always"]["step_bytes"]["decode"], rel=0.15)


@pytest.mark.parametrize("case", CASES, ids=[f"{case.layer}-{at}" for at, case in enumerate(CASES)])
def test_widths_are_those_that_the_model_has(case: Case, insitu_records: Recording) -> None:
    dtype = torch.float32
    with torch.device("meta"):
        meta = case.make().to(dtype).eval()
    sites = catalogue(meta).plan(["?*"])
    found = shapes_of(meta, sites)
    model = random_model(case, dtype)
    rules = [insitu.Rule(sites="?*", take="summary", every=1 << 40)]
    with torch.inference_mode(), insitu.attach(model, to=insitu_records, rules=rules) as session:
        model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs.items()})
        observer = session._observer
        assert observer is not None
        real = {n: (width, str(kind).removeprefix("torch.")) for n, (width, kind) in observer.taps.shapes.items()}
        names = {site.number: site.name for site in session.sites()}
    assert {names[n] for n in real.keys() - found.keys()} == set()
    assert {names[n]: found[n] for n in real} == {names[n]: real[n] for n in real}


def test_a_share_of_step_time_grows_with_what_is_taken(folder: Path) -> None:
    little, much = (
        planned(folder, *TRAFFIC, *rules_of(f"*,take=summary,every={every}"))["step_time_share"] for every in (1000, 1)
    )
    assert 0 < little["decode"] < much["decode"]
    halved = planned(folder, *TRAFFIC, "--decode-ms", "1000000")["step_time_share"]
    assert halved["decode"] < little["decode"]


@pytest.mark.usefixtures("_tap_of_10_us")
def test_what_a_plan_cannot_keep_is_noted(folder: Path) -> None:
    found = planned(
        folder, *rules_of("*,requests=all,max_bytes_per_s=1kB", "L0.*,requests=all"), "--max-rows", "1000000"
    )
    assert found["rules"][0]["bytes_per_s"] == 1000 < found["rules"][0]["asked_bytes_per_s"]
    bound, shadow, memory = found["notes"]
    assert bound.startswith("rule 1 asks for ")
    assert shadow == "rule 2 takes nothing: earlier rules of its kind name all its sites"
    assert memory.startswith("the rows of two steps take ")
    assert found["memory_bytes"]["rows"] > ROW_BUDGET_BYTES


@pytest.mark.usefixtures("_tap_of_10_us")
@pytest.mark.parametrize(
    ("decode_ms", "said"),
    [
        ("0.01", "what every step pays would be over overhead_budget=0.5, with and without these rules"),
        ("0.65", "what rules add would be over overhead_budget=0.5: summaries, and rows that nobody asks "),
        ("1e9", None),
    ],
)
def test_what_the_governor_would_not_allow_is_noted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, decode_ms: str, said: str | None
) -> None:
    monkeypatch.setenv("INSITU_OVERHEAD_BUDGET", "0.5")
    times = ("--decode-ms", decode_ms, "--prefill-ms", decode_ms)
    notes = planned(folder, *TRAFFIC, *times, *rules_of("*,take=summary,every=1"))["notes"]
    assert [note.startswith(said or "?") for note in notes] == [True] * (said is not None)


@pytest.mark.usefixtures("_tap_of_10_us")
def test_what_the_setting_t0_leaves_out_is_not_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules_of("L0.mlp_out,take=summary,every=1000000")
    every = planned(folder, *TRAFFIC, *rule)
    monkeypatch.setenv("INSITU_T0", "boundary")
    few = planned(folder, *TRAFFIC, *rule)
    assert (every["num_tapped"], few["num_tapped"]) == (27, 3)
    decode_ns = 25e6
    assert every["step_time_share"]["always"]["decode"] == pytest.approx((30_000 + 27 * 10_000) / decode_ns)
    assert few["step_time_share"]["always"]["decode"] == pytest.approx((30_000 + 2 * 10_000) / decode_ns)


@pytest.mark.usefixtures("_tap_of_10_us")
def test_long_tensors_are_timed_in_part_and_counted_whole(folder: Path) -> None:
    short, long = (planned(folder, "--prompt", str(rows))["step_time_share"]["prefill"] for rows in (1024, 1 << 20))
    assert long > 100 * short


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rule", "L*.resid_pst"], "Error: no site matches 'L*.resid_pst'; the nearest are L*.resid_post, "),
        (["--rule", "*,rows=lst"], "Error: --rule '*,rows=lst': rows='lst' is not known"),
        (["--rule", "*,rate=3"], "Error: --rule '*,rate=3': no key 'rate'"),
        (["--rule", "*,rows=first:65", "--max-rows", "64"], "Error: rows='first:65' counts off more rows of a step"),
        (["--rules", "no-such.toml"], "Error: no-such.toml cannot be read: No such file or directory"),
        (["--max-rows", "many"], "Error: max_rows: 'many' is no count"),
        (
            ["--axis", "logits=rows"],
            "Error: --axis 'logits=rows': write SITES=AXIS with an axis of tokens, samples, batch",
        ),
    ],
)
def test_bad_rules_are_one_line(folder: Path, args: list[str], message: str) -> None:
    result = run(folder, *args)
    assert result.exit_code == 2
    assert result.output.startswith(message)
    assert result.output.count("\n") == 1


def test_an_axis_of_no_site_is_refused_with_the_nearest_and_one_of_the_file_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(folder, "--axis", "logit=samples")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: --axis: no site matches 'logit'; the nearest are logits")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "insitu.toml").write_text('[axes]\n"logit" = "samples"\n')
    result = run(folder)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("insitu: axes in insitu.toml: no site matches 'logit'; the nearest are logits")


def test_rules_come_from_a_file_and_then_from_the_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text('[[rules]]\nsites = "L0.*"\nrequests = 0.25\n')
    found = planned(folder, "--rules", file, *rules_of("logits"))
    assert [rule["rule"] for rule in found["rules"]] == ["L0.*,requests=0.25", "logits"]
    file.write_text('[[rules]]\nsites = "L0.*"\nrequest = 0.25\n')
    result = run(folder, "--rules", file)
    assert result.output.startswith(
        f"Error: {file}: rule 1: no key 'request' (did you mean 'requests'?); the keys are "
    )


@pytest.mark.usefixtures("_tap_of_10_us")
def test_logits_of_sampled_tokens_alone_are_fewer(folder: Path) -> None:
    rule = rules_of("logits,requests=all")
    every, sampled = (planned(folder, *TRAFFIC, *rule, *more) for more in (("--axis", "logits=tokens"), ()))
    sizes = [found["rules"][0]["step_bytes"] for found in (every, sampled)]
    assert sizes[0]["decode"] == sizes[1]["decode"]
    assert sizes[0]["prefill"] == PROMPT * sizes[1]["prefill"]


@pytest.mark.usefixtures("_tap_of_10_us")
def test_without_rules_only_what_is_always_taken_is_said(folder: Path) -> None:
    found = planned(folder)
    assert (found["rules"], found["notes"], found["num_tapped"]) == ([], [], 27)
    assert found["bytes_per_s"] == found["always"]["bytes_per_s"] > 0
    assert found["memory_bytes"]["rows"] == found["memory_bytes"]["statistics"] == 0
