"""What `make bench-collector` concludes from made data, what its loads send, and its smallest real run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from collector_results import FramesResult, Percentiles, SpansResult, percentiles, spans_targets
from collector_runs import AGAIN, FRAMES, Size, frames, recovery
from frame_load import ROWS, Frames
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from otlp_load import requests
from otlp_runs import INSITU, PHOENIX, spans
from overhead_figures import Ratio

from insitu.wire.insitu_pb2 import ToCollector
from insitu_collector.service.frame_check import checked_batch

ROOT = Path(__file__).parents[1]
SMALLEST = Size(rounds=2, round_mib=2, kills=1, left_mib=32)
"""Twice the window is sent before the kill, so half of it was acknowledged."""


def of_frames(low: float, median: float, high: float, end_mib: float = 100.0) -> FramesResult:
    ratios = [Ratio(AGAIN, 1.0, 0.995, 1.005, 20), Ratio(FRAMES, median, low, high, 20)]
    none = Percentiles(0.0, 0.0)
    return FramesResult(1, 1, {}, ratios, none, none, {}, 100.0, end_mib, end_mib, 64, 64, 0.0)


@pytest.mark.parametrize(
    ("result", "speed", "memory"),
    [
        (of_frames(0.80, 0.81, 0.815), "met", "met"),
        (of_frames(0.70, 0.71, 0.715), "missed", "met"),
        (of_frames(0.70, 0.80, 0.90), "too noisy", "met"),
        (replace(of_frames(0.80, 0.81, 0.815), foreign_share=0.2), "too noisy", "met"),
        (of_frames(0.80, 0.81, 0.815, end_mib=111.0), "met", "missed"),
    ],
)
def test_frames_are_held_against_the_bare_disk(result: FramesResult, speed: str, memory: str) -> None:
    assert result.targets["frames"] == f"target >= 0.8: {speed}"
    assert result.targets["memory"].endswith(memory)


def test_a_row_that_is_not_found_again_is_told() -> None:
    assert of_frames(0.8, 0.8, 0.8).is_right
    assert not replace(of_frames(0.8, 0.8, 0.8), num_found=63).is_right
    assert SpansResult(PHOENIX, 512, 0, unable="it is not installed").is_right
    assert not SpansResult(INSITU, 512, 1024, seconds=1.0, num_found=1023).is_right


def test_times_are_told_by_their_median_and_the_slowest_hundredth() -> None:
    assert percentiles([0.001] * 98 + [0.5, 0.5]).p50_ms == pytest.approx(1.0)
    assert percentiles([0.001] * 98 + [0.5, 0.5]).p99_ms == pytest.approx(500.0)
    with pytest.raises(ValueError, match="there are no times"):
        percentiles([])


@pytest.mark.parametrize(("seconds", "answer"), [(1.0, "met"), (2.0, "missed")])
def test_the_target_of_spans_is_of_our_own_receiver(seconds: float, answer: str) -> None:
    ours = SpansResult(INSITU, 512, 200_000, seconds=seconds, num_found=200_000)
    peer = SpansResult(PHOENIX, 512, 10_240, seconds=1.0, num_found=10_240)
    assert spans_targets([peer, ours], INSITU) == {INSITU: f"target >= 150k spans/s: {answer}"}
    assert spans_targets([peer, replace(ours, unable="no OTLP receiver")], INSITU) == {}
    assert spans_targets([replace(ours, foreign_share=0.2)], INSITU)[INSITU].endswith("too noisy")


def test_frames_are_such_as_a_probe_sends_and_their_rows_follow_on() -> None:
    made = Frames(epoch=7, seed=0)
    for seq in range(3):
        number, message = made.take()
        frame = ToCollector.FromString(message).frame
        batch = checked_batch(7, frame)
        assert (number, batch.seq, batch.table) == (seq, seq, "captures")
        assert batch.data["row_seq"].to_pylist() == list(range(seq * ROWS, (seq + 1) * ROWS))
    assert abs(made.num_bytes / (1 << 20) - 1.0) < 0.01


def test_requests_of_spans_differ_in_every_id_and_in_nothing_else() -> None:
    made = [ExportTraceServiceRequest.FromString(each) for each in requests(3, 5, seed=1)]
    all_spans = [span for each in made for span in each.resource_spans[0].scope_spans[0].spans]
    assert len({span.trace_id for span in all_spans}) == len({span.span_id for span in all_spans}) == 15
    assert len({len(span.trace_id) for span in all_spans} | {len(span.span_id) for span in all_spans}) == 2
    for span in all_spans:
        span.ClearField("trace_id")
        span.ClearField("span_id")
    assert made[0] == made[1] == made[2]


def test_the_smallest_run_finds_all_of_its_rows(tmp_path: Path) -> None:
    found = frames(SMALLEST, 0, tmp_path)
    assert found.is_right and found.num_rows == 3 * SMALLEST.round_mib * ROWS, "a round to warm up is among them"
    assert 0 < found.received.p50_ms <= found.durable.p50_ms
    assert found.cpu_ms_per_mib["collector"] > 0 < found.cpu_ms_per_mib["load generator"]
    assert set(found.mib_per_s) == {FRAMES, AGAIN, "raw write + fdatasync"} and min(found.mib_per_s.values()) > 0


def test_the_smallest_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    found = recovery(SMALLEST, 0, tmp_path)
    assert found.is_right
    assert found.num_bytes[0] > 0 < found.num_acknowledged
    assert 0 < found.ratio.median <= 1.0


def test_a_peer_that_is_not_there_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    ours, peer = spans(True, tmp_path / "no-python", tmp_path)
    assert peer.unable == f"it is not installed ({tmp_path / 'no-python'})"
    assert ours.unable == "no OTLP receiver" or ours.num_found == ours.num_spans > 0
