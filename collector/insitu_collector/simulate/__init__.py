"""Runs that exist only as records: what a healthy or faulty engine would have written. For tests, trials and tools.

A discrete-event run of replicas of S stages of T ranks with a few micro-batches in flight, random arrivals, service
times that depend on batch shape, and faults. Nothing here knows how records are judged, and no record tells what was
asked for.
"""

from insitu_collector.simulate.rows import RUN
from insitu_collector.simulate.run import append, processes, simulate, write_store
from insitu_collector.simulate.scenario import LAYERS, MS, SECOND, UNIX_MINUS_MONO_NS, Fault, Place, Scenario

__all__ = [
    "LAYERS",
    "MS",
    "RUN",
    "SECOND",
    "UNIX_MINUS_MONO_NS",
    "Fault",
    "Place",
    "Scenario",
    "append",
    "processes",
    "simulate",
    "write_store",
]
