"""Attached models: same outputs, true rows, the first bad site, nothing left behind."""

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import insitu
from insitu.testing import Recording, expect, oracle_model


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_bit_identical_attached_and_detached(
    insitu_records: Recording, dtype: torch.dtype, grad: bool
) -> None:
    net, x = small_net().to(dtype), torch.randn(5, 8).to(dtype)
    with torch.set_grad_enabled(grad):
        before = net(x)
        with insitu.attach(net, to=insitu_records, rules=[insitu.Rule(sites="*", requests="all")]):
            during = [net(x) for _ in range(3)]
        after = net(x)
    assert all(torch.equal(before, output) for output in [*during, after])


def test_detach_leaves_the_model_as_found(insitu_records: Recording) -> None:
    net = small_net()
    session = insitu.attach(net, to=insitu_records)
    assert {type(module) for module in net.modules()} == {nn.Sequential, nn.Linear, nn.ReLU}
    assert all("forward" in vars(module) for module in net.modules())
    session.detach()
    assert not any("forward" in vars(module) for module in net.modules())
    session.close()


def test_captured_rows_are_those_of_the_request(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=3, width=4)
    rules = [insitu.Rule(sites="L*.mlp_out", requests="opt-in")]
    with insitu.attach(model, to=insitu_records, rules=rules) as session:
        model(torch.zeros(1, 1, 4))
        rows = [
            insitu.Rows("quiet", start=0, count=2, position=0),
            insitu.Rows("wanted", start=2, count=3, position=40, capture=True),
        ]
        model.say_next(77)
        with session.step(77, rows=rows, phase="prefill"):
            model(torch.zeros(1, 5, 4))
    captures = insitu_records.rows("captures")
    assert {(row["request"], row["step_id"]) for row in captures} == {("wanted", 77)}
    assert len(captures) == 9
    assert all(row["position"] == 40 + row["row"] - 2 for row in captures)
    expect(insitu_records).the_oracle_is_right()


def test_padded_rows_are_not_looked_at(insitu_records: Recording) -> None:
    net = small_net()
    x = torch.randn(6, 8)
    x[4:] = float("nan")
    with (
        insitu.attach(net, to=insitu_records) as session,
        session.step(rows=[insitu.Rows("a", start=0, count=4)], num_padded=2),
    ):
        net(x)
    assert [row["nonfinite_rows"] for row in insitu_records.rows("summaries")] == [[]]


def test_the_first_bad_site_and_row_of_a_step_are_named(insitu_records: Recording) -> None:
    model = oracle_model(num_layers=4, width=4)
    with insitu.attach(model, to=insitu_records) as session:
        model(torch.zeros(3, 4))

        def poison(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[1, 2] = float("nan")
            return output

        handle = model.model.layers[2].self_attn.register_forward_hook(poison)
        with session.step(9):
            model(torch.zeros(3, 4))
        handle.remove()
        model(torch.zeros(3, 4))
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    flagged = insitu_records.rows("summaries", step_id=9)
    bad = [names[row["site"]] for row in flagged if not np.isfinite(row["canary"])]
    assert bad[0] == "L2.mlp_out"
    assert expect(flagged, nonfinite_rows=[1])["num_rows"] == 3
    assert len(insitu_records.rows("summaries", step_id=10)) == 1, "a clean step ships its boundary only"


def test_a_bad_value_in_a_step_that_samples_nothing_is_seen_in_that_step(insitu_records: Recording) -> None:
    inner = oracle_model(num_layers=2, width=4)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner.model
            self.lm_head = nn.Linear(4, 8)

        def forward(self, x: torch.Tensor, samples: int) -> torch.Tensor:
            hidden: torch.Tensor = self.model(x)
            return self.lm_head(hidden[:samples]) if samples else hidden

    model = Decoder()
    with torch.no_grad(), insitu.attach(model, to=insitu_records):
        model(torch.zeros(3, 4), 3)
        model(torch.full((3, 4), float("nan")), 0)
    names = {row["site"]: row["name"] for row in insitu_records.rows("sites")}
    flagged = insitu_records.rows("summaries", step_id=1)
    assert names[flagged[0]["site"]] == "L0.attn_out"
    (boundary,) = [row for row in flagged if row["nonfinite_rows"]]
    assert (names[boundary["site"]], boundary["nonfinite_rows"]) == ("L1.resid_post", [0, 1, 2])


def test_a_site_that_never_fires_is_named(insitu_records: Recording) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.used(x)
            return output

    net = Idle()
    with insitu.attach(net, to=insitu_records) as session:
        net(torch.zeros(1, 2))
        session.flush()
        coverage = session.coverage()
    assert (coverage.fired, coverage.never_fired, coverage.steps) == (2, ["unused"], 1)


def test_a_second_thread_runs_unobserved_and_is_counted(insitu_records: Recording) -> None:
    net = small_net()
    with insitu.attach(net, to=insitu_records) as session:
        with session.step(1):
            thread = threading.Thread(target=net, args=(torch.full((1, 8), float("nan")),))
            thread.start()
            thread.join()
            net(torch.zeros(1, 8))
        session.flush()
        assert session.stats().concurrent_forward == 1
    assert [row["nonfinite_rows"] for row in insitu_records.rows("summaries")] == [[]]


def test_an_explicit_tap_is_a_site_of_its_own(insitu_records: Recording) -> None:
    class Tapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return insitu.tap(x * 2, "doubled") + 1

    net = Tapped()
    with insitu.attach(net, to=insitu_records) as session:
        for _ in range(2):
            assert net(torch.ones(2)).tolist() == [3.0, 3.0]
        net(torch.full((2,), float("inf")))
        session.flush()
        assert session.coverage().never_fired == []
    number = expect(insitu_records.rows("sites"), name="doubled")["site"]
    flagged = insitu_records.rows("summaries", step_id=2, site=number)
    assert [row["canary"] for row in flagged] == [float("inf")]


def test_an_exception_in_the_model_passes_through_and_the_next_step_is_observed(
    insitu_records: Recording,
) -> None:
    net = small_net()
    with insitu.attach(net, to=insitu_records):
        with pytest.raises(RuntimeError, match="shapes"):
            net(torch.zeros(1, 3))
        net(torch.zeros(1, 8))
    assert [row["step_id"] for row in insitu_records.rows("summaries")] == [1]


def test_observe_decorates_a_class_a_factory_and_a_step_function(insitu_records: Recording) -> None:
    @insitu.observe(to=insitu_records, stage=3)
    class Ranker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.net(x)
            return output

    @insitu.observe(to=insitu_records)
    def make() -> nn.Module:
        return small_net()

    @insitu.observe(to=insitu_records)
    def step(x: int) -> int:
        with insitu.interval("host"):
            return x + 1

    ranker, net = Ranker(), make()
    ranker(torch.zeros(1, 2))
    net(torch.zeros(1, 8))
    assert [step(1), step(2)] == [2, 3]
    for observed in (ranker, net, step):
        vars(observed)["insitu"].close()
    stages = {row["epoch"]: row["stage"] for row in insitu_records.rows("sources")}
    assert sorted(stages.values()) == [0, 0, 3]
    assert len(insitu_records.rows("steps")) == 3
    epoch = vars(step)["insitu"].source.epoch
    assert len(insitu_records.rows("intervals", epoch=epoch)) == 1, "a step function is observed from its second call"


def test_a_model_is_attached_once(insitu_records: Recording) -> None:
    net = small_net()
    with insitu.attach(net, to=insitu_records), pytest.raises(ValueError, match="already attached"):
        insitu.attach(net, to=insitu_records)
    insitu.attach(net, to=insitu_records).close()


def test_a_copy_of_an_attached_model_works_by_itself(insitu_records: Recording) -> None:
    net, x = small_net(), torch.randn(3, 8)
    with insitu.attach(net, to=insitu_records):
        twin = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
            assert twin(x).tolist() == [[0.0] * 4] * 3
            assert net(x).abs().sum() > 0


def test_an_error_of_the_probe_never_reaches_the_model(
    insitu_records: Recording, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    net, x = small_net(), torch.randn(3, 8)
    expected = net(x)
    session = insitu.attach(net, to=insitu_records)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # outside pytest errors are contained
    assert session._observer is not None
    monkeypatch.setattr(session._observer.taps, "_take_boundary", None)
    assert all(torch.equal(net(x), expected) for _ in range(3))
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "insitu: the taps failed and are switched off"
    ]
    session.close()


def test_disabled_leaves_everything_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_DISABLED", "1")
    net, threads = small_net(), threading.active_count()
    session = insitu.attach(net, to="grpc://127.0.0.1:1")
    assert type(net) is nn.Sequential
    assert threading.active_count() == threads
    with session.step(rows=[insitu.Rows("a", 0, 1)]), session.interval("compute") as interval:
        interval.turn("host")
        net(torch.zeros(1, 8))
    session.request("arrived", "a")
    assert session.close().durable == 0


def test_a_bad_rule_or_destination_says_so_at_once(insitu_records: Recording) -> None:
    with pytest.raises(ValueError, match="no site matches 'L9'"):
        insitu.attach(small_net(), to=insitu_records, rules=[insitu.Rule(sites="L9")])
    with pytest.raises(ValueError, match=r"^axes: no site matches 'L9'; the nearest are "):
        insitu.attach(small_net(), to=insitu_records, axes={"L9": "samples"})
    with pytest.raises(ValueError, match="no known scheme"):
        insitu.attach(small_net(), to="ftp://nowhere")


def test_an_axis_of_no_site_in_the_file_that_other_models_read_is_said(
    insitu_records: Recording, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "insitu.toml").write_text('axes = { "L9" = "samples", "*" = "tokens" }')
    monkeypatch.chdir(tmp_path)
    net = small_net()
    with insitu.attach(net, to=insitu_records):
        net(torch.ones(2, 8))
    said = [line for line in caplog.messages if "axes" in line]
    assert len(said) == 1 and "insitu.toml: no site matches 'L9'; the nearest are " in said[0]
    assert {row["axis"] for row in insitu_records.rows("sites")} == {"tokens"}


def test_every_public_name_is_itself_whatever_was_used_before() -> None:
    code = (
        "import insitu, types, itertools\n"
        "for name in ['start', 'Session', 'Rows', 'attach', 'interval', 'tap', 'observe', 'off', 'Rule']:\n"
        "    getattr(insitu, name)\n"
        "import insitu.verbs, insitu.session.live, insitu.session.row_map, insitu.session.intervals\n"
        "import insitu.rules.rule, insitu.taps.eager, insitu.run.command, insitu.flight.settings\n"
        "print([name for name in insitu.__all__ if isinstance(getattr(insitu, name), types.ModuleType)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_loads_neither_torch_nor_arrow_nor_grpc() -> None:
    code = "import insitu, sys; print(sorted({'torch', 'pyarrow', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SCRIPTS: dict[str, Callable[[], Any]] = {
    "traced": lambda: torch.jit.trace(nn.Linear(3, 3), torch.ones(2, 3)),  # type: ignore[no-untyped-call]
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(3, 3))),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", SCRIPTS.values(), ids=SCRIPTS)
def test_a_script_is_refused_in_a_line_and_as_a_part_it_is_run_unseen(
    make: Callable[[], Any], insitu_records: Recording
) -> None:
    script, x = make(), torch.ones(2, 3)
    before = threading.active_count()
    with pytest.raises(ValueError, match="attach to the one that it was made of") as raised:
        insitu.attach(script, to=insitu_records)
    assert "\n" not in str(raised.value)
    assert (threading.active_count(), insitu_records.batches) == (before, [])
    model = nn.Sequential(script, nn.Identity())
    with insitu.attach(model, to=insitu_records) as session:
        assert torch.equal(model(x), script(x))
        assert session.stats().probe_errors == 0


def test_a_module_whose_parameters_are_not_made_yet_is_refused_until_it_was_run(insitu_records: Recording) -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match="run it once, then attach"):
        insitu.attach(model, to=insitu_records)
    model(torch.ones(2, 3))
    with insitu.attach(model, to=insitu_records):
        model(torch.ones(2, 3))
    assert len(insitu_records.rows("steps")) == 1
