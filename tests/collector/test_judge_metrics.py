"""What Prometheus sees of a judge, scraped over HTTP; and each rule of the alerts file fires on what is exposed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import click
import pyarrow.compute as pc
import pytest
import yaml
from alert_kit import of_just_now, serving
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from wait_kit import until

from insitu.vocabulary import VerdictKind
from insitu_collector.judge.metrics import JudgeMetrics, Snapshot
from insitu_collector.judge.runs import Judge
from insitu_collector.notify.alerts import QUIET
from insitu_collector.plugins import Plugins
from insitu_collector.simulate import Fault, Scenario, simulate, write_store
from insitu_collector.store import open_store

RULES: Final = Path(__file__).parents[2] / "deploy/prometheus/alerts.yml"
SLOW: Final = Scenario(seed=3, seconds=9.0, faults=(Fault("slow", 4.0, 1, ms=12.0),))
SELECTOR: Final = re.compile(r"(insitu_\w+)(?:\{([^}]*)\})?")
MATCHER: Final = re.compile(r'(\w+)(=~?)"([^"]*)"')
BY: Final = re.compile(r"by \(([\w, ]*)\)")


def scrape(port: int) -> list[Sample]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def matching(expr: str, samples: list[Sample]) -> list[Sample]:
    """The samples a rule's selector takes, as Prometheus matches labels: a label that is missing is empty."""
    ((name, matchers),) = SELECTOR.findall(expr)
    found = [sample for sample in samples if sample.name == name]
    for label, operator, value in MATCHER.findall(matchers):
        pattern = value if operator == "=~" else re.escape(value)
        found = [sample for sample in found if re.fullmatch(pattern, sample.labels.get(label, ""))]
    return found


@pytest.fixture
def everything() -> Snapshot:
    """A judge with every kind of incident, and with troubles of its own."""
    kinds = [*(str(kind) for kind in VerdictKind), "acme.thermal"]
    return Snapshot(
        standing=Counter(("run", kind, "1", "1") for kind in kinds),
        lag_s={"run": 31.0},
        look_s=0.5,
        incidents=dict.fromkeys(kinds, 2),
        deliveries={"http://there": {"sent": 1, "failed": 2, "given_up": 3, "dropped": 4}},
        num_plugins_failed=1,
    )


def test_each_rule_takes_what_a_scrape_shows_and_nothing_else(everything: Snapshot) -> None:
    with closing(JudgeMetrics(0)) as metrics:
        before = scrape(metrics.port)
        metrics.publish(everything)
        samples = scrape(metrics.port)
    told: set[str] = set()
    for rule in rules():
        found = matching(rule["expr"], samples)
        assert found, f"{rule['alert']} can never fire"
        assert not any(sample.value for sample in matching(rule["expr"], before)), f"{rule['alert']} always fires"
        labels = set(found[0].labels)
        named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        for by in BY.findall(rule["expr"]):
            kept = {label.strip() for label in by.split(",")}
            assert kept <= labels, f"{rule['alert']} groups by a label that is not there"
            assert named <= kept, f"{rule['alert']} names a label it has lost"
        assert named <= labels
        told |= {sample.labels["kind"] for sample in found if "kind" in sample.labels}
        assert len([sample for sample in found if sample.name == "insitu_verdict_open"]) <= 1
    assert told == {str(kind) for kind in VerdictKind if kind not in QUIET} | {"acme.thermal"}
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)


def test_values_are_what_was_published(everything: Snapshot) -> None:
    with closing(JudgeMetrics(0)) as metrics:
        metrics.publish(everything)
        found = {(s.name, *sorted(s.labels.items())): s.value for s in scrape(metrics.port)}
    place = (("kind", "stuck"), ("rank", "1"), ("run", "run"), ("stage", "1"))
    assert found["insitu_verdict_open", *place] == 1
    assert found["insitu_incidents_total", ("kind", "stuck")] == 2
    assert found["insitu_alerts_total", ("outcome", "dropped"), ("receiver", "http://there")] == 4
    assert found["insitu_judge_lag_seconds", ("run", "run")] == 31
    assert found["insitu_judge_look_seconds",] == 0.5


def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(click.ClickException, match="choose another --metrics-port"):
            JudgeMetrics(held.getsockname()[1])


def test_a_run_that_is_over_is_no_alarm(tmp_path: Path) -> None:
    tables = simulate(SLOW)
    recent = of_just_now(tables)
    health = recent["health"]
    place, last_ns = health.schema.get_field_index("closing"), pc.max(health["t_ns"]).as_py()
    is_last = pc.greater(health["t_ns"], last_ns - 1_500_000_000)
    said_goodbye = health.set_column(place, health.schema.field(place), is_last)
    assert pc.sum(said_goodbye["closing"]).as_py() >= 2
    runs = {"old": (tables, {}), "now": (recent, {"5eed5eed"}), "ended": (recent | {"health": said_goodbye}, {})}
    for name, (run, expected) in runs.items():
        write_store(run, str(tmp_path / name))
        judge = Judge(open_store(tmp_path / name), plugins=Plugins())
        judge.look()
        found = judge.snapshot()
        judge.close()
        assert found.incidents == {"stage_limits": 1}
        assert set(found.lag_s) == {run for run, *_ in found.standing} == set(expected)


def test_a_judge_is_scraped_while_it_judges(tmp_path: Path) -> None:
    write_store(of_just_now(simulate(SLOW)), str(tmp_path / "store"))
    with serving() as server:
        command = [sys.executable, "-m", "insitu", "judge", str(tmp_path / "store"), "--metrics-port", "0"]
        process = subprocess.Popen(
            [*command, "--webhook", server.url], stderr=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        try:
            assert process.stderr is not None
            port = int(process.stderr.readline().rpartition(":")[2].partition("/")[0])
            server.got.get(timeout=40)
            sent = until(
                lambda: [s for s in scrape(port) if s.labels.get("outcome") == "sent" and s.value],
                "an alert that was sent",
            )
            samples = scrape(port)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
    assert process.returncode == 0
    assert "secret" not in sent[0].labels["receiver"]
    (open_,) = [s for s in samples if s.name == "insitu_verdict_open"]
    assert open_.labels == {"run": "5eed5eed", "kind": "stage_limits", "stage": "1", "rank": "1"}
    (lag,) = [s.value for s in samples if s.name == "insitu_judge_lag_seconds"]
    assert 0 < lag < 60
