"""What a judge shows Prometheus: what stands now, how many incidents there were, how far it is behind.

A snapshot is published after each look, and a scrape reads the last one: neither waits for the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from prometheus_client.core import Metric

HOST: Final = "127.0.0.1"
Place = tuple[str, str, str, str]
"""(run, kind, stage, rank); a stage or rank of nobody is empty."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a judge between two looks."""

    standing: Counter[Place] = field(default_factory=Counter)
    """Incidents that are open, of runs that go on; `healthy` is one too."""
    lag_s: Mapping[str, float] = field(default_factory=dict)
    """Run that goes on -> age of its latest row."""
    look_s: float = 0.0
    """How long the last look took."""
    incidents: Mapping[str, int] = field(default_factory=dict)
    """Kind -> how many have opened since this judge began."""
    deliveries: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Receiver -> outcome -> alerts."""
    num_plugins_failed: int = 0


class JudgeMetrics:
    """Serves `/metrics` on the loopback address; a Prometheus of another host reads it through a proxy of yours."""

    def __init__(self, port: int) -> None:
        """port: 0 picks a free one. Raises ClickException, one line, when it cannot be had or the extra is missing."""
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError:
            raise click.ClickException(
                "--metrics-port needs the package prometheus-client: pip install 'insitu[collector]'"
            ) from None
        registry = CollectorRegistry()
        self._snapshot = Snapshot()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, HOST, registry)
        except OSError as error:
            raise click.ClickException(
                f"cannot serve metrics on {HOST}:{port}: {error.strerror}; choose another --metrics-port (0: any)"
            ) from None

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def publish(self, snapshot: Snapshot) -> None:
        """Show this from now on."""
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; what prometheus-client asks for at each scrape."""
        yield from metrics_of(self._snapshot)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def metrics_of(now: Snapshot) -> Iterator[Metric]:
    """Return a snapshot as metric families."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ("run", "kind", "stage", "rank")
    yield _family(GaugeMetricFamily, "insitu_verdict_open", "Incidents that are open now.", labels, now.standing)
    lag = {(run,): seconds for run, seconds in now.lag_s.items()}
    yield _family(GaugeMetricFamily, "insitu_judge_lag_seconds", "Age of a run's latest row.", ("run",), lag)
    yield GaugeMetricFamily("insitu_judge_look_seconds", "Time the last look took.", now.look_s)
    counted = {(kind,): num for kind, num in now.incidents.items()}
    yield _family(CounterMetricFamily, "insitu_incidents", "Incidents that have opened.", ("kind",), counted)
    sent = {(to, outcome): num for to, outcomes in now.deliveries.items() for outcome, num in outcomes.items()}
    yield _family(CounterMetricFamily, "insitu_alerts", "Alerts by what became of them.", ("receiver", "outcome"), sent)
    yield CounterMetricFamily("insitu_plugins_failed", "Verdict plug-ins switched off.", now.num_plugins_failed)


def _family(family: Any, name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    made = family(name, text, labels=labels)
    for place, value in sorted(values.items()):
        made.add_metric(place, value)
    return made  # type: ignore[no-any-return]
