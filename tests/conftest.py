"""What tests of several packages use, and of which section of CI each of them is."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; threads of one would wait for the other's
settings.register_profile("insitu", deadline=None)  # how long an example takes is the machine's doing
settings.load_profile("insitu")

TESTS: Final = Path(__file__).resolve().parent
MODEL: Final = TESTS.parent / "examples" / "models" / "tiny-llama"
SECTIONS: Final[Mapping[str, str]] = {
    "probe": "probe",
    "gpu": "probe",
    "test_integration_cost.py": "probe",
    "test_overhead_bench.py": "probe",
    "test_vllm_look.py": "probe",
    "vllm": "vllm",
    "engine": "engine",
    "dashboard": "dashboard",
    "test_notebooks.py": "dashboard",
    "test_prediction_bench.py": "dashboard",
    "test_recall_plot.py": "dashboard",
    "test_recall_truth.py": "dashboard",
    "test_trial_rigs.py": "dashboard",
    "test_trial_rules.py": "dashboard",
    "test_verdict_recall.py": "dashboard",
    "e2e/test_one_in_flight.py": "dashboard",
    "e2e/test_requests.py": "dashboard",
    "e2e/test_tensor_parallel.py": "dashboard",
    "e2e/test_trial_rig.py": "dashboard",
    "e2e/test_collector_away.py": "collector",
    "e2e/test_flight_ranks.py": "collector",
    "e2e/test_forwarding.py": "collector",
    "e2e/test_help_examples.py": "collector",
    "golden": "probe",
    "e2e/test_demo.py": "engine",
    "e2e/test_faults_demo.py": "engine",
    "e2e": "e2e",
}
"""Folder or file in tests/ -> its section, what `make test-SECTION` runs. `dashboard` is that of verdicts, too; whole
systems are tested in the section of what the test is about, as far as its minutes reach."""
OTHERS: Final = "collector"
"""The section of all else."""


def section_of(path: Path) -> str | None:
    """Return the section of a file or folder; None for a folder that holds several."""
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    name = "/".join(parts[:2])
    if not parts or any(key.startswith(f"{name}/") for key in SECTIONS):
        return None
    return SECTIONS.get(name, SECTIONS.get(parts[0], OTHERS))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--section", choices=sorted({*SECTIONS.values(), OTHERS}), help="Tests of one section of CI only.")
    parser.addoption("--soak-s", type=float, default=300.0, help="How long the soak of row 30 is; 86400 for a day.")
    parser.addoption("--soak-log", type=Path, help="A file for its log, to be kept in docs/soak.")
    parser.addoption("--third", metavar="SEED", help="Every third of the tests asked for, drawn by this seed.")
    parser.addoption("--marked", metavar="MARK", help="Read no file without a test marked so: quicker than -m alone.")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption("section")
    is_of_another = wanted is not None and section_of(collection_path) not in (None, wanted)
    mark = config.getoption("marked") if collection_path.suffix == ".py" else None
    return is_of_another or (mark is not None and f"mark.{mark}" not in collection_path.read_text()) or None


@pytest.hookimpl(trylast=True)  # a third of those that marks have left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of another section that were asked for by name: such files are never ignored."""
    wanted, seed = config.getoption("section"), config.getoption("third")
    kept = [item for item in items if wanted is None or section_of(item.path) == wanted]
    if seed is not None:
        drawn = random.Random(seed).sample(range(len(kept)), k=-(-len(kept) // 3))
        kept = [kept[index] for index in sorted(drawn)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def sections() -> frozenset[str]:
    """The sections that tests are of."""
    return frozenset({*SECTIONS.values(), OTHERS})


@pytest.fixture(scope="session")
def model() -> Path:
    """The checkpoint the repository ships."""
    assert (MODEL / "model.safetensors").exists(), "examples/train_tiny_llama.py makes it"
    return MODEL


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Python collects no garbage by itself: where a test lists every interval, a pause would be one more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
