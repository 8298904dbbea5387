"""The example with Ray Train, where Ray is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_the_documents_example_with_ray_trains_in_two_workers(tmp_path):
    pytest.importorskip("ray.train.lightning")
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/recipes/ray.md").read_text(), re.DOTALL)[0]
    (tmp_path / "example.py").write_text(code)
    quiet = {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "example.py"], env={**os.environ, **quiet}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Of two workers with 4 environments, in rollouts of 128 steps.
    assert done.stdout.strip().splitlines()[-1].split() == ["10240", "10240"]
