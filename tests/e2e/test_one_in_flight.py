"""A real pipeline of two ranks that is given one micro-batch at a time: told, with the gain of a second one.

Part of `make soak`: CI runs a trial of each of these kinds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_system import MODEL, Process

from insitu_collector.evidence import Evidence
from insitu_collector.rows.slices import JUDGED, Groups, latest
from insitu_collector.steps.times import step_times
from insitu_collector.store import open_store
from insitu_collector.verdicts.pipeline_underfilled import WINDOW_NS, look, measure
from insitu_collector.whatif.report import what_if

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(180)]


def test_one_in_flight_on_two_ranks_is_underfilled_while_requests_wait(tmp_path: Path) -> None:
    store = tmp_path / "store"
    options = ["--stages", "2", "--in-flight", "1", "--max-batch", "2", "--token-budget", "64", "--port", "0"]
    serve = Process(["-m", "insitu", "serve", "--model", str(MODEL), *options, "--to", f"file://{store}"])
    try:
        url = serve.wait_for(r"ready on (http://[\w.:]+)")[1]
        load = ["load", "--url", url, "--seconds", "11.5", "--concurrency", "8", "--quiet"]
        ran = subprocess.run([sys.executable, "-m", "insitu", *load], capture_output=True, text=True, check=True)
    finally:
        serve.stop()
    assert json.loads(ran.stdout)["failed"] == 0
    groups = Groups().sort({name: open_store(store).table(name) for name in JUDGED})
    group = latest(groups)
    assert group is not None
    evidence = Evidence()
    evidence.add(groups[group])
    assert evidence.traffic_ns is not None
    times = {rank: steps.only(~steps.warmup) for rank, steps in step_times(evidence, 0).items()}
    filling = measure(evidence, times, 2)
    assert filling is not None
    assert (filling.num_slots, filling.t1_ns - filling.t0_ns) == (1, WINDOW_NS)
    assert filling.in_flight <= 1.0
    assert filling.demand > 0.9
    replayed = what_if(evidence, filling.t0_ns, filling.t1_ns)
    assert replayed is not None
    assert replayed.waiting > 3, "eight users, two places"
    (found,) = look(evidence, times, replayed)
    assert found.text.startswith("the pipeline is underfilled")
    assert found.remedy == "Let 2 micro-batches be in flight (`--in-flight 2`)."
