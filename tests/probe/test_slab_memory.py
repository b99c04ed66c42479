"""Slabs may take half of what the machine and each cgroup around the process leave, as the kernel's files say."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from insitu.slabs.memory import NoMemory, available_bytes, check_room

CPU: Final = torch.device("cpu")
MEMINFO: Final = "MemTotal: 99999999 kB\nMemAvailable: 2048 kB\n"
"""2 MiB."""
V1: Final = "sys/fs/cgroup/memory"
V2: Final = "sys/fs/cgroup"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(group: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{V2}/{group}/memory.max": f"{limit}\n",
        f"{V2}/{group}/memory.current": f"{usage}\n",
        f"{V2}/{group}/memory.stat": f"anon 1\ninactive_file {inactive}\nactive_file 7\n",
    }


def v1(group: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{V1}/{group}/memory.limit_in_bytes": f"{limit}\n",
        f"{V1}/{group}/memory.usage_in_bytes": f"{usage}\n",
        f"{V1}/{group}/memory.stat": f"inactive_file 5\ntotal_inactive_file {inactive}\n",
    }


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert available_bytes(CPU, root) == 2 << 20


def test_where_nobody_says_it_is_more_than_there_is(tmp_path: Path) -> None:
    assert available_bytes(CPU, tmp_path) == sys.maxsize


def test_a_machine_that_has_less_than_the_limit_leaves_is_what_counts(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **v2("", str(1 << 40), 0)}
    assert available_bytes(CPU, tree(tmp_path, files)) == 2 << 20


def test_a_cgroup_of_version_2_leaves_its_limit_less_what_is_used_and_cannot_be_had_back(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", **v2("a/b", "1000000", 600_000, 50_000)}
    assert available_bytes(CPU, tree(tmp_path, files)) == 450_000


def test_a_cgroup_of_version_1_too(tmp_path: Path) -> None:
    told = "9:name=systemd:/\n4:cpuset,memory:/a/b\n1:cpu:/\n"
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": told, **v1("a/b", "1000000", 600_000, 50_000)}
    assert available_bytes(CPU, tree(tmp_path, files)) == 450_000


@pytest.mark.parametrize(
    ("told", "files"),
    [("4:memory:/docker/0f3a\n", v1("", "1000000", 1)), ("0::/docker/0f3a\n", v2("", "1000000", 1))],
    ids=["version 1", "version 2"],
)
def test_a_container_that_sees_its_own_cgroup_as_the_root_has_that_limit(
    told: str, files: Mapping[str, str], tmp_path: Path
) -> None:
    root = tree(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": told, **files})
    assert available_bytes(CPU, root) == 999_999


def test_a_path_out_of_what_is_mounted_is_not_followed(tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/../../x\n", **v2("", "1000000", 1), **v2("../x", "9", 1)}
    assert available_bytes(CPU, tree(tmp_path, files)) == 999_999


@pytest.mark.parametrize("text", ["", "\n", "memory", "0::", "no number\n", "12x 34", "\0", "-5"])
def test_what_cannot_be_read_limits_nothing(text: str, tmp_path: Path) -> None:
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": f"0::/a\n{text}\n", **v2("a", text, 1)}
    root = tree(tmp_path, files)
    assert available_bytes(CPU, root) == 2 << 20
    (root / "proc/meminfo").write_text(f"MemAvailable: {text}\n")
    assert available_bytes(CPU, root) == sys.maxsize


def test_a_limit_whose_usage_nobody_says_limits_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", **v2("a", "1000", 1)})
    (root / V2 / "a/memory.current").unlink()
    assert available_bytes(CPU, root) == 2 << 20


groups = st.tuples(st.none() | st.integers(0, 4 << 20), st.integers(0, 4 << 20), st.integers(0, 1 << 20))


@given(st.lists(groups, min_size=1, max_size=4), st.booleans())
def test_the_least_that_any_cgroup_around_the_process_leaves_counts(
    chain: Sequence[tuple[int | None, int, int]], is_v2: bool
) -> None:
    """From the root down to the process's own; a sibling does not matter."""
    names = [f"/g{at}" for at in range(1, len(chain))]
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": f"{'0:' if is_v2 else '3:memory'}:{''.join(names) or '/'}\n"}
    write, no_limit = (v2, "max") if is_v2 else (v1, str(0x7FFFFFFFFFFFF000))
    for at, (limit, usage, inactive) in enumerate(chain):
        files |= write("".join(names[:at]).lstrip("/"), no_limit if limit is None else str(limit), usage, inactive)
    files |= write("sibling", "0", 1)
    left = [max(0, min(limit, limit - usage + inactive)) for limit, usage, inactive in chain if limit is not None]
    with tempfile.TemporaryDirectory() as folder:
        assert available_bytes(CPU, tree(Path(folder), files)) == min(2 << 20, *left, sys.maxsize)


def test_more_than_half_of_what_a_cgroup_leaves_is_refused(tmp_path: Path) -> None:
    files = {"proc/meminfo": "MemAvailable: 999999 kB\n", "proc/self/cgroup": "0::/\n", **v2("", str(8 << 20), 0)}
    root = tree(tmp_path, files)
    check_room("it", 4 << 20, CPU, root)
    with pytest.raises(NoMemory, match="it would take 5 MiB of memory, and may take 4"):
        check_room("it", 5 << 20, CPU, root)
