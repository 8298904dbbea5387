"""A gradient that is no number in one of two processes is left out, or refused, by both (F07)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable, "-m", "ppo_lightning", "fit", "--model.env", "CartPole-v1", "--model.num_envs", "2",
    "--model.num_steps", "16", "--model.total_steps", "256", "--model.num_minibatches", "2", "--model.policy", "poison.Poison",
    "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2", "--seed_everything", "3",
    "--trainer.enable_progress_bar", "false", "--trainer.limit_val_batches", "0", "--trainer.callbacks+=dump.Dump",
    "--name", "version",
]  # fmt: skip


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("PL_GLOBAL_SEED", None)
    return subprocess.run([*COMMAND, *flags], cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.long
def test_both_ranks_leave_the_same_steps_out(tmp_path):
    done = run(tmp_path, "--model.non_finite", "skip")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1))
    assert first["updates"] == second["updates"]
    for name, tensor in first["state_dict"].items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, second["state_dict"][name]), name
    table = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert table[-1].split(",")[table[0].split(",").index("train/skipped_steps")] == "3"


@pytest.mark.long
def test_both_ranks_refuse_the_step_and_leave_a_file_each(tmp_path):
    done = run(tmp_path)
    assert done.returncode != 0
    for name in ("non_finite.pt", "non_finite_rank_1.pt"):
        left = torch.load(tmp_path / "lightning_logs/version_0" / name, weights_only=True)
        assert len(left["samples"]["observation"]) == 16
        assert all(tensor.isfinite().all() for tensor in left["policy"].values())
    assert "the gradient's norm is nan in iteration 1, the step was not taken" in done.stderr
