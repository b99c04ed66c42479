"""`insitu run`: real programs that know nothing of insitu are observed, and end as they would have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from insitu_collector.store import open_store

pytestmark = pytest.mark.timeout(240)

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x))

torch.manual_seed(0)
x = torch.ones(3, 4)
"""


class Program:
    """A program in a folder of its own, and the store it is observed into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith("INSITU_")}

    def write(self, code: str, name: str = "serve.py") -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(NET * name.startswith("serve") + textwrap.dedent(code))
        return path

    def command(self, *words: str, options: tuple[str, ...] = ()) -> list[str]:
        words = words or (sys.executable, "serve.py")
        return [sys.executable, "-m", "insitu", "run", "--to", f"file://{self.store}", *options, "--", *words]

    def run(self, *words: str, options: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, options=options),
            cwd=self.folder,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def rows(self, table: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = open_store(self.store).table(table).to_pylist()
        return rows

    def ranks(self) -> list[dict[str, Any]]:
        return sorted(self.rows("sources"), key=lambda row: (row["replica"], row["rank"]))


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def test_a_plain_model_is_observed_from_its_first_call_and_nothing_stays_on_the_way(program: Program) -> None:
    program.write("""
        from torch.nn.modules import module
        before = module._has_any_global_hook
        model = Net().eval()
        with torch.no_grad():
            hidden = torch.relu(nn.functional.linear(x, model.body[0].weight, model.body[0].bias))
            expected = nn.functional.linear(hidden, model.head.weight, model.head.bias)
            for _ in range(5):
                assert torch.equal(model(x), expected)
                assert not module._global_forward_pre_hooks and not model._forward_pre_hooks
                assert not model._forward_hooks and module._has_any_global_hook.__module__ == module.__name__
        print(len([part for part in model.modules() if part._forward_hooks or part._forward_pre_hooks]))
    """)
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert "insitu: attached to Net: 5 sites, rank 0, stage 0, to file://" in done.stderr
    (source,) = program.ranks()
    assert (source["model"], source["rank"], source["stage"], source["replica"]) == ("Net", 0, 0, 0)
    assert [row["step_id"] for row in program.rows("steps")] == [0, 1, 2, 3, 4]
    assert {row["step_id"] for row in program.rows("intervals") if row["cls"] == 4} == {0, 1, 2, 3, 4}
    last = next(row["site"] for row in program.rows("sites") if row["name"] == "output")
    assert [row["step_id"] for row in program.rows("summaries") if row["site"] == last] == [0, 1, 2, 3, 4]
    assert program.rows("health")[-1]["closing"]


@pytest.mark.soak
def test_a_transformers_model_is_observed_while_it_generates(program: Program, model: Path) -> None:
    program.write(f"""
        from transformers import AutoModelForCausalLM
        decoder = AutoModelForCausalLM.from_pretrained({str(model)!r}, dtype=torch.float32)
        decoder.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    """)
    done = program.run()
    assert done.returncode == 0, done.stderr
    assert "attached to LlamaForCausalLM" in done.stderr
    assert len(program.rows("steps")) == 6
    assert {"embed", "L0.mlp_out", "logits"} <= {row["name"] for row in program.rows("sites")}


@pytest.mark.matrix
def test_an_encoder_and_a_decoder_of_transformers_are_observed_each(program: Program) -> None:
    """`generate` calls the encoder alone, and the `eval` of transformers is not that of torch."""
    program.write("""
        from transformers import T5Config, T5ForConditionalGeneration
        shape = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        whole = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, pad_token_id=0)).eval()
        whole.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    """)
    done = program.run()
    assert done.returncode == 0, done.stderr
    assert [(row["replica"], row["model"]) for row in program.ranks()] == [
        (0, "T5Stack"),
        (1, "T5ForConditionalGeneration"),
    ]
    replicas = {row["epoch"]: row["replica"] for row in program.ranks()}
    steps = [
        (replicas[row["epoch"]], {entry["request"] for entry in row["rows"] or ()}) for row in program.rows("steps")
    ]
    assert sorted(steps, key=lambda step: step[0]) == [(0, set()), *[(1, {"generate-0/0"})] * 6]


@pytest.mark.matrix
def test_a_model_with_an_eval_of_its_own_is_seen_beside_others(program: Program) -> None:
    program.write("""
        class Own(Net):
            def eval(self):
                return self.train(False)

        first, second, third = Own().eval(), Own().eval(), Own()
        for model in first, second, third.train(False):
            model(x)
    """)
    done = program.run()
    assert done.returncode == 0, done.stderr
    assert [(row["replica"], row["model"]) for row in program.ranks()] == [(at, "Own") for at in range(3)]


def test_a_model_that_is_not_there_is_said_at_exit(program: Program) -> None:
    program.write("Net().to('meta').eval()(x.to('meta'))\n")
    done = program.run()
    assert done.returncode == 0, done.stderr
    assert "the Net was called before its parameters were there (offloaded, or lazy)" in done.stderr


@pytest.mark.parametrize(
    ("options", "stages"), [((), [0, 0]), pytest.param(("--stage", "rank"), [0, 1], marks=pytest.mark.matrix)]
)
def test_each_rank_of_torchrun_has_its_place(program: Program, options: tuple[str, ...], stages: list[int]) -> None:
    program.write("""
        import torch.distributed as dist
        dist.init_process_group("gloo")
        model = Net().eval()
        for _ in range(3):
            dist.all_reduce(model(x).detach())
        dist.destroy_process_group()
    """)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "serve.py")
    done = program.run(*torchrun, options=options)
    assert done.returncode == 0, done.stderr
    ranks = program.ranks()
    assert [(row["rank"], row["stage"], row["replica"]) for row in ranks] == [(0, stages[0], 0), (1, stages[1], 0)]
    assert len({row["run"] for row in ranks}) == 1
    assert sorted(row["step_id"] for row in program.rows("steps")) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("ending", "status"), [("raise ValueError('mine')", 1), ("raise SystemExit(7)", 7)])
def test_a_program_that_fails_does_so_as_before_and_its_rows_are_kept(
    program: Program, ending: str, status: int
) -> None:
    program.write(f"model = Net().eval()\nmodel(x)\nmodel(x)\n{ending}\n")
    done = program.run()
    assert done.returncode == status
    assert done.stderr.rstrip().endswith("ValueError: mine") is (status == 1)
    assert len(program.rows("steps")) == 2
    assert program.rows("health")[-1]["closing"]


def test_an_error_in_the_very_first_call_is_the_programs_own(program: Program) -> None:
    program.write("""
        model = Net().eval()
        try:
            model(torch.ones(3, 5))
        except RuntimeError as error:
            print("shapes" in str(error))
        model(x)
    """)
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert [row["step_id"] for row in program.rows("steps")] == [0, 1]


def test_the_programs_own_sitecustomize_runs_and_ours_is_out_of_sight(program: Program) -> None:
    own = program.write("print('theirs')\nmine = 1\n", "own/sitecustomize.py")
    program.write("""
        import sys
        import sitecustomize
        print(sitecustomize.mine, [path for path in sys.path if path.endswith("startup")])
        Net().eval()(x)
    """)
    path = os.pathsep.join([str(own.parent), program.variables.get("PYTHONPATH", "")])
    done = program.run(PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (0, "theirs\ntheirs\n1 []\n"), done.stderr  # `insitu run` is a Python too
    assert len(program.rows("steps")) == 1


def test_a_sitecustomize_that_fails_is_told_as_always_and_the_model_is_observed(program: Program) -> None:
    own = program.write("raise LookupError('theirs')\n", "own/sitecustomize.py")
    program.write("Net().eval()(x)\n")
    path = os.pathsep.join([str(own.parent), program.variables.get("PYTHONPATH", "")])
    done = program.run(PYTHONPATH=path)
    assert done.returncode == 0
    assert "Error in sitecustomize" in done.stderr
    assert len(program.rows("steps")) == 1


def test_row_15_sigterm_kills_it_with_its_last_rows_durable(program: Program) -> None:
    program.write("""
        import time
        model = Net().eval()
        for _ in range(20):
            model(x)
        print("serving", flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen(
        program.command(), cwd=program.folder, env=program.variables, stdout=subprocess.PIPE, text=True
    ) as served:
        assert served.stdout is not None
        assert served.stdout.readline() == "serving\n"
        served.send_signal(signal.SIGTERM)
        assert served.wait(30) == -signal.SIGTERM
    assert len(program.rows("steps")) == 20
    assert program.rows("health")[-1]["closing"]


def test_switched_off_it_is_the_bare_command(program: Program) -> None:
    program.write("""
        import os, sys
        Net().eval()(x)
        print("startup" in os.environ.get("PYTHONPATH", ""), [name for name in sys.modules if "insitu" in name])
    """)
    done = program.run(INSITU_DISABLED="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False []\n", "")
    assert not program.store.exists()


def test_the_command_takes_the_place_of_the_process(program: Program) -> None:
    with subprocess.Popen(
        program.command(sys.executable, "-c", "import os; print(os.getpid())"),
        cwd=program.folder,
        env=program.variables,
        stdout=subprocess.PIPE,
        text=True,
    ) as served:
        assert served.communicate()[0] == f"{served.pid}\n"


def test_code_that_attaches_wins(program: Program) -> None:
    program.write("""
        import insitu
        model = Net().eval()
        with insitu.attach(model, model_name="by-code"):
            model(x)
        Net().eval()(x)
    """)
    done = program.run()
    assert done.returncode == 0, done.stderr
    assert "attached to" not in done.stderr
    assert [row["model"] for row in program.ranks()] == ["by-code"]


def test_code_that_attaches_later_takes_over(program: Program) -> None:
    program.write("""
        import insitu
        model = Net().eval()
        model(x)
        session = insitu.attach(model, model_name="by-code")
        model(x)
        print(session.close().dropped)
    """)
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert "what `insitu run` attached gives way" in done.stderr
    assert {row["model"] for row in program.ranks()} == {"Net", "by-code"}
    assert len(program.rows("steps")) == 2


def test_each_model_is_a_replica_up_to_four_and_the_others_are_counted(program: Program) -> None:
    program.write("""
        models = [Net().eval() for _ in range(6)]
        for _ in range(3):
            for model in models:
                model(x)
    """)
    done = program.run()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("insitu: attached to Net") == 4
    assert done.stderr.count("4 models of this process are observed; Net and others are not") == 1
    assert "2 more models were called and not observed" in done.stderr
    assert [row["replica"] for row in program.ranks()] == [0, 1, 2, 3]
    assert len(program.rows("steps")) == 12


@pytest.mark.soak
def test_parts_of_a_model_that_are_called_alone_do_not_share_a_site(program: Program) -> None:
    program.write("""
        model = Net().eval()
        for _ in range(12):
            hidden = model.body(x)
            model.head(hidden)
            model(x)
    """)
    done = program.run()
    assert done.returncode == 0, done.stderr
    names = {source["epoch"]: source["model"] for source in program.ranks()}
    assert sorted(names.values()) == ["Linear", "Net", "Sequential"]
    sites = {
        name: {row["name"] for row in program.rows("sites") if names[row["epoch"]] == name} for name in names.values()
    }
    assert sites == {"Sequential": {"0", "1", "output"}, "Linear": {"output"}, "Net": {"output"}}
    assert not [row for row in program.rows("events") if row["kind"] == "site_never_fired"]


@pytest.mark.soak
def test_training_is_left_alone_and_what_was_seen_is_said(program: Program) -> None:
    program.write("""
        import sys
        model = Net()
        model.body.eval()  # as one freezes a part
        loss = model(x).sum()
        loss.backward()
        if len(sys.argv) > 1:
            with torch.inference_mode():
                model(x)
            model(x)
    """)
    done = program.run()
    assert "nothing was observed: no model was called for inference; the Net was called in training mode" in done.stderr
    assert not program.store.exists()
    done = program.run(sys.executable, "serve.py", "infer")
    assert "insitu: attached to Net: 5 sites" in done.stderr
    assert len(program.rows("steps")) == 2


@pytest.mark.soak
def test_the_models_class_can_be_chosen(program: Program) -> None:
    program.write("Net().eval()(x)\n")
    assert "attached to Sequential" in program.run(options=("--model", "Seq*")).stderr
    said = program.run(options=("--model", "No*")).stderr
    assert "the Net was called and --model No* means another" in said


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.soak)])
def test_workers_are_replicas_and_flush_when_they_end(program: Program, method: str) -> None:
    program.write(f"""
        import multiprocessing, threading

        def work(model, barrier):
            for _ in range(3):
                model(x)
            barrier.wait(60)

        if __name__ == "__main__":
            context = multiprocessing.get_context({method!r})
            barrier = context.Barrier(2)
            model = Net().eval()
            workers = [context.Process(target=work, args=(model, barrier)) for _ in range(2)]
            [worker.start() for worker in workers]
            [worker.join() for worker in workers]
            print([worker.exitcode for worker in workers])
    """)
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "[0, 0]\n"), done.stderr
    assert [(row["replica"], row["rank"]) for row in program.ranks()] == [(0, 0), (1, 0)]
    assert len(program.rows("steps")) == 6
    assert [row["closing"] for row in program.rows("health")].count(True) == 2


@pytest.mark.soak
def test_a_worker_forked_from_an_observed_process_is_another_replica(program: Program) -> None:
    program.write("""
        import multiprocessing
        model = Net().eval()
        model(x)
        worker = multiprocessing.get_context("fork").Process(target=model, args=(x,))
        worker.start()
        worker.join()
        print(worker.exitcode)
    """)
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert [row["replica"] for row in program.ranks()] == [0, 1]
    assert len(program.rows("steps")) == 2


@pytest.mark.soak
def test_a_compiled_model_is_found_behind_its_wrapper_without_a_warning(program: Program) -> None:
    program.write("""
        model = Net().eval()
        compiled = torch.compile(model, backend="eager")
        with torch.inference_mode():
            outputs = [compiled(x) for _ in range(3)]
            print(all(torch.equal(output, outputs[0]) for output in outputs))
    """)
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "global hooks" not in done.stderr
    assert "attached to Net" in done.stderr
    assert len(program.rows("steps")) == 3


def test_a_python_without_insitu_serves_on_and_says_so(program: Program) -> None:
    blocker = """
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name == "insitu" and sys.argv[0] == "serve.py":
                    raise ModuleNotFoundError("No module named 'insitu'", name="insitu")
        sys.meta_path.insert(0, Blocker())
    """
    own = program.write(blocker, "own/sitecustomize.py")
    program.write("Net().eval()(x)\nprint('served')\n")
    path = os.pathsep.join([str(own.parent), program.variables.get("PYTHONPATH", "")])
    done = program.run(PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (0, "served\n")
    assert (
        done.stderr == f"insitu: nothing is observed by {sys.executable}: it has no package insitu; install it there\n"
    )


@pytest.mark.soak
def test_a_forward_that_was_replaced_on_the_instance_is_left_alone_and_said(program: Program) -> None:
    program.write("""
        model = Net().eval()
        model.forward = lambda x: "theirs"
        print(model(x), model(x), "forward" in vars(model), type(model) is Net)
    """)
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "theirs theirs True True\n")
    assert "the forward of this Net was replaced on the instance" in done.stderr


def test_a_destination_that_cannot_be_written_is_one_line(program: Program) -> None:
    program.write("model = Net().eval()\nmodel(x)\nmodel(x)\nprint('served')\n")
    program.store.write_text("a file")
    done = program.run()
    assert (done.returncode, done.stdout) == (0, "served\n")
    assert [line.partition(" of process")[0] for line in done.stderr.splitlines()] == ["insitu: no model"]
    assert "Error" not in done.stderr


def test_a_rank_that_is_none_is_one_line_and_the_program_serves_on(program: Program) -> None:
    program.write("model = Net().eval()\nmodel(x)\nmodel(x)\nprint('served')\n")
    done = program.run(RANK="5", WORLD_SIZE="2")
    assert (done.returncode, done.stdout) == (0, "served\n")
    (line,) = done.stderr.splitlines()
    assert line.startswith("insitu: no model of process ")
    assert "RANK: '5' is no rank where WORLD_SIZE is 2; write a whole number from 0 to 1" in line
    assert not program.store.exists()
