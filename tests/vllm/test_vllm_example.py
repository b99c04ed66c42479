"""`examples/10_vllm.py` runs as it stands, with vLLM's own settings, and prints what is in its store."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from vllm_cases import DEADLINE_S, ROOT, end

from insitu_collector.store import open_store

LAST_PROMPT = "Once there was a brave farmer who lived by the river and"
WIDTH = 192


def test_the_example_of_vllm_runs_as_shown(vllm_python: str, tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "INSITU", "VLLM"))}
    with (tmp_path / "said").open("w") as out, (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [vllm_python, str(ROOT / "examples" / "10_vllm.py")],
            env={**own, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=out,
            stderr=log,
            cwd=tmp_path,
            start_new_session=True,
        )
    code = end(process, DEADLINE_S)
    said = (tmp_path / "said").read_text()
    assert code == 0, said + (tmp_path / "log").read_text()[-4000:]

    assert f"\n2: {LAST_PROMPT} ..." in said
    spent = re.findall(r"^stage 0: (\w+) +([\d.]+) ms in (\d+)$", said, re.M)
    assert {"compute", "host", "wait_upstream", "no_demand"} <= {name for name, _, _ in spent}
    assert all(float(ms) >= 0 and int(number) > 0 for _, ms, number in spent)
    store = open_store(tmp_path / "insitu-store")
    assert store.intervals().num_rows > sum(int(number) for _, _, number in spent), "the scheduler's are beside them"

    ((name, num_positions, width),) = re.findall(r"^(\S+): L3\.resid_post \((\d+), (\d+)\)$", said, re.M)
    assert name.startswith("2-") and int(width) == WIDTH
    ran = [entry for step in store.table("steps").to_pylist() for entry in step["rows"] if entry["request"] == name]
    assert int(num_positions) == sum(entry["count"] for entry in ran)
