"""Two-rank trials: draws follow from the seed and can be done, rulings see every way of being wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trial_rigs
from hypothesis import given
from hypothesis import strategies as st
from rig_plans import (
    CONTENDED,
    EXPECTED,
    HOT_SHARE,
    LATE_MS,
    MARGIN,
    NUM_EXPERTS,
    PIPELINE,
    SHARES,
    SITES,
    STOP_S,
    TENSOR,
    TOO_SHORT,
    Rig,
    draw_rig,
    row_errors,
    rule_rig,
)
from trial_rigs import RIGS, commands, left_out
from two_rank_models import PROMPTS, TRIED, Stage, Witness, favour, prompts_of, whole_model
from two_ranks import main as two_ranks

from insitu_collector.judge.judgement import Judgement
from insitu_collector.simulate import Fault, Scenario, simulate
from insitu_collector.steps import slow_stage
from insitu_collector.verdicts import straggler_rank

KINDS = st.sampled_from(sorted(EXPECTED))
SEEDS = st.integers(0, 2**32)
NAMED = [kind for kind, expected in EXPECTED.items() if expected is not None]


def verdict(rig: Rig, **fields: Any) -> dict[str, Any]:
    """Return the verdict that a rig must get."""
    expected = EXPECTED[rig.kind]
    stage = 0 if rig.program == TENSOR else rig.rank
    text = f"so {rig.says}90 % of tokens" if rig.kind == "experts" else f"so {rig.says}"
    return {"kind": str(expected), "stage": stage, "rank": rig.rank, "site": rig.site, "text": text} | fields


HEALTHY = {"kind": "healthy", "stage": None, "rank": None, "site": None, "text": "healthy"}
BUSY = HEALTHY | {"kind": "host_contended"}


@given(KINDS, SEEDS)
def test_a_trial_follows_from_its_kind_and_seed(kind: str, seed: int) -> None:
    assert draw_rig(kind, seed) == draw_rig(kind, seed)
    assert draw_rig(kind, seed).kind == kind


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_twenty_seeds_are_not_one_trial(kind: str) -> None:
    assert len({draw_rig(kind, seed).did for seed in range(1, 21)}) > 10 or kind == "silent-site"
    assert len({draw_rig("silent-site", seed).site for seed in range(1, 21)}) > 4
    assert {draw_rig("drops", seed).lost for seed in range(1, 4)} == {"captures", "intervals"}


@given(KINDS.filter(lambda kind: kind != "straggler"), SEEDS)
def test_ranks_of_a_pipeline_can_be_asked_for_what_is_drawn(kind: str, seed: int) -> None:
    rig = draw_rig(kind, seed)
    assert rig.program == PIPELINE
    for rank in (0, 1):
        words = [*rig.options, *rig.own[rank], "--rank", str(rank), "--meeting", "m", "--to", "file://s"]
        context = two_ranks.make_context("two_ranks", words)  # raises for what the program does not take
        asked = context.params
        assert asked["steps"] > asked["warmup"] + 320, "expert loads are judged after 20 steps of one in 16"
        assert sum(asked["capture"]) <= asked["steps"] and asked["burst"][0] < asked["steps"]
        if asked["favoured"] is not None:
            layer, expert, _ = asked["favoured"]
            assert layer // 2 == rig.rank and expert < NUM_EXPERTS[asked["model"]]
        assert asked["inline"] in ("", *SITES[rig.rank or 0])


@given(SEEDS)
def test_a_straggler_is_later_than_the_limits_that_are_stated(seed: int) -> None:
    rig = draw_rig("straggler", seed)
    late_ms = float(rig.options[rig.options.index("--ms") + 1])
    assert LATE_MS[0] <= late_ms <= LATE_MS[1]
    assert late_ms * 1e6 >= 2 * max(straggler_rank.MIN_LATE_NS, slow_stage.MIN_COMPUTING_NS)


def test_what_a_straggler_does_meanwhile_must_be_told() -> None:
    busy, asleep = (draw_rig("straggler", seed) for seed in (2, 1))
    assert ("--busy" in busy.options, "--busy" in asleep.options) == (True, False)
    for rig, other in ((busy, asleep), (asleep, busy)):
        assert rule_rig(rig, [verdict(rig, text=f"late{other.says}5.1 ms")], 0.0, None).wrong


@given(SEEDS)
def test_a_second_host_is_ahead_and_only_one_kind_writes_files(seed: int) -> None:
    alone, together = draw_rig("clock", seed), draw_rig("two-hosts", seed)
    assert alone.by_file and not together.by_file
    assert alone.ahead_s and together.ahead_s
    assert EXPECTED["two-hosts"] is None


def test_a_second_host_has_a_boot_id_of_its_own_and_the_first_has_not(tmp_path: Path) -> None:
    rig = draw_rig("two-hosts", 1)
    first, second = commands(rig, tmp_path, "grpc://127.0.0.1:1")
    assert "unshare" not in first and second[0] == "unshare"
    assert str(rig.ahead_s) in second
    assert second[-len(first) :] == [
        word if word != "0" or first[n - 1] != "--rank" else "1" for n, word in enumerate(first)
    ]
    assert len((tmp_path / "boot_id").read_text().strip()) == 36


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("seed", range(1, 7))
def test_what_was_done_must_be_said_at_its_place(kind: str, seed: int) -> None:
    rig = draw_rig(kind, seed)
    share = 0.9 if kind == "experts" else None
    named = verdict(rig)
    assert rule_rig(rig, [named], 0.0, share).right
    assert rule_rig(rig, [named, HEALTHY | {"kind": "inconclusive"}], 0.0, share).right
    assert rule_rig(rig, [HEALTHY], 0.0, share).missed == [f"no {EXPECTED[kind]} that says {rig.says!r}"]
    assert rule_rig(rig, [], 0.0, share).missed
    elsewhere = verdict(rig, rank=1 - (rig.rank or 0), stage=1)
    assert rule_rig(rig, [named, elsewhere], 0.0, share).wrong
    assert rule_rig(rig, [elsewhere], 0.0, share).missed
    assert rule_rig(rig, [verdict(rig, text="so something else")], 0.0, share).wrong


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_nothing_else_may_be_named(kind: str) -> None:
    rig = draw_rig(kind, 3)
    said = [verdict(rig)] if EXPECTED[kind] is not None else [HEALTHY]
    share = 0.9 if kind == "experts" else None
    for other in ("stuck", "stage_limits", "gc_pause", "fail_slow", "prefill_delays_decode", "of_a_plug_in"):
        assert rule_rig(rig, [*said, HEALTHY | {"kind": other}], 0.9, share).wrong
    other_kind = "clock_uncertain" if kind != "clock" else "site_never_fired"
    assert rule_rig(rig, [*said, HEALTHY | {"kind": other_kind}], 0.9, share).wrong


def inconclusive(reason: str) -> dict[str, Any]:
    return HEALTHY | {"kind": "inconclusive", "text": f"{reason} and so on."}


def test_two_hosts_are_healthy_or_short_or_share_too_few_cores_and_nothing_else() -> None:
    rig = draw_rig("two-hosts", 1)
    assert rule_rig(rig, [HEALTHY], 0.0, None).right
    for excused in (TOO_SHORT, CONTENDED):
        assert rule_rig(rig, [inconclusive(excused)], 0.0, None).right
    leapt = inconclusive("inconclusive: the clock of host b leapt by about 9.0 s")
    assert rule_rig(rig, [leapt], 0.0, None).missed == [f"inconclusive at stage None rank None: {leapt['text']}"]
    assert rule_rig(rig, [leapt], 0.2, None).right
    assert rule_rig(rig, [HEALTHY | {"kind": "clock_uncertain"}], 0.0, None).wrong
    assert rule_rig(rig, [], 0.0, None).missed


@pytest.mark.parametrize(("fault", "excuse"), [(None, TOO_SHORT), (Fault("foreign", size=4.0, host=0), CONTENDED)])
def test_a_judge_excuses_itself_in_the_words_that_are_looked_for(fault: Fault | None, excuse: str) -> None:
    faults = () if fault is None else (fault,)
    judgement = Judgement()
    told = judgement.look(simulate(Scenario(seconds=2.0 if fault is None else 4.8, faults=faults)), final=True)
    assert [verdict for verdict in told if verdict.text.startswith(excuse)], told


@pytest.mark.parametrize("kind", sorted(EXPECTED))
def test_a_withdrawn_verdict_is_not_right(kind: str) -> None:
    rig, share = draw_rig(kind, 2), 0.9 if kind == "experts" else None
    said = [verdict(rig)] if EXPECTED[kind] is not None else [HEALTHY]
    assert rule_rig(rig, said, 0.0, share).right
    assert rule_rig(rig, said, 0.0, share, revised=2).missed == ["2 verdicts were withdrawn"]


def test_contention_is_allowed_where_others_were_seen_or_each_host_is_the_others_neighbour() -> None:
    rig = draw_rig("silent-site", 1)
    assert rule_rig(rig, [verdict(rig), BUSY], 0.0, None).wrong
    assert rule_rig(rig, [verdict(rig), BUSY], 0.2, None).right
    assert rule_rig(draw_rig("two-hosts", 1), [BUSY], 0.0, None).right


def test_the_share_of_an_expert_must_be_what_a_witness_counted() -> None:
    rig = draw_rig("experts", 1)
    told = verdict(rig)  # 90 %
    assert rule_rig(rig, [told], 0.0, 0.93).right
    assert rule_rig(rig, [told], 0.0, 0.98).missed
    for weak in (None, MARGIN * HOT_SHARE - 0.01):
        assert any("no trial" in why for why in rule_rig(rig, [told], 0.0, weak).missed)


@given(SEEDS)
def test_a_router_that_is_drawn_is_beyond_the_limit(seed: int) -> None:
    rig = draw_rig("experts", seed)
    share = float(rig.options[-1])
    assert rig.least_share is not None
    assert rig.least_share + 0.04 < SHARES[0] <= share <= SHARES[1]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("model", "layer", "expert", "share"), [("mixtral", 3, 7, 0.8), ("qwen3-moe", 0, 2, 0.9)])
def test_a_router_sends_the_share_it_is_asked_for(seed: int, model: str, layer: int, expert: int, share: float) -> None:
    """To a token, of the steps by which it was set."""
    torch.manual_seed(seed)
    whole = whole_model(model, 256).eval()
    favour(whole, layer, expert, share)
    witness = Witness(whole.model.layers[layer].mlp.gate, expert)
    with torch.inference_mode():
        for step in TRIED:
            whole.model(prompts_of(step, 256))
    assert witness.num_chosen / witness.num_tokens == pytest.approx(share, abs=0.001)


def source(**dropped: dict[str, int]) -> dict[str, Any]:
    return {"produced": {"steps": 10, "captures": 8}, "dropped": dropped}


def test_every_row_is_stored_or_counted_as_dropped() -> None:
    quiet, lossy = draw_rig("silent-site", 1), draw_rig("drops", 3)
    assert lossy.lost == "captures"
    twice = [source(), source(captures={"slab_full": 3})]
    assert row_errors(lossy, twice, {"steps": 20, "captures": 13}) == []
    assert row_errors(lossy, twice, {"steps": 19, "captures": 13}) == ["steps: 20 produced, 19 stored, 0 dropped"]
    assert row_errors(lossy, twice, {"steps": 20, "captures": 13, "events": 1}) == [
        "events: 0 produced, 1 stored, 0 dropped"
    ]
    assert row_errors(quiet, twice, {"steps": 20, "captures": 13}) == ["3 rows were dropped, of captures"]
    assert row_errors(quiet, [source()], {"steps": 10, "captures": 8}) == []
    assert row_errors(lossy, [source()], {"steps": 10, "captures": 8}) == [
        "no row of captures was lost: that is no trial of drops"
    ]


def test_a_collector_stands_still_for_less_than_a_rank_may_be_silent() -> None:
    stops = [draw_rig("drops", seed).stop_s for seed in range(2, 20, 3)]
    assert all(STOP_S[0] <= stop_s <= STOP_S[1] for stop_s in stops)


def test_what_cannot_be_run_here_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_rigs, "can_be_another_host", lambda: False)
    assert left_out(["gc", "clock", "drops", "two-hosts"]) == ["clock", "two-hosts"]
    assert left_out(["gc"]) == []
    monkeypatch.setattr(trial_rigs, "can_be_another_host", lambda: True)
    assert left_out(["clock"]) == []


@pytest.mark.parametrize("site", [site for sites in SITES for site in sites])
def test_using_the_weights_alone_changes_no_output(site: str) -> None:
    torch.manual_seed(1)
    whole = whole_model("llama", 64).eval()
    ids = prompts_of(5, 64)
    assert ids.shape[0] == PROMPTS

    def logits(inlined: str) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = Stage(whole, 1, inlined)(Stage(whole, 0, inlined)(ids))
        return found

    with torch.inference_mode():
        expected = whole(ids).logits
    torch.testing.assert_close(logits(""), expected)
    torch.testing.assert_close(logits(site), expected)


def test_every_kind_has_a_runner() -> None:
    assert RIGS.keys() == EXPECTED.keys()
