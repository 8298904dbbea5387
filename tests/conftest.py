"""What all tests share: one thread, a folder of their own, no seed left over from another test."""

import gc
import logging
import warnings

import lightning
import pytest
import torch
from commands import save_empty
from matplotlib.figure import Figure

from ppo_lightning import PPO
from ppo_lightning.cli import PPOCLI

RUN_NAME = PPOCLI.run_name
"""What names runs outside of these tests."""

# Python's own thresholds look for garbage so often that it takes a seventh of the time of a command.
gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Tests that may take long begin first, so that none is left over when the other processes have ended."""

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("timeout")
        return mark.args[0] if mark else 0.0

    items.sort(key=seconds, reverse=True)


@pytest.fixture(autouse=True)
def _alone(request, monkeypatch, tmp_path):
    if request.node.get_closest_marker("paints") is None:
        monkeypatch.setattr(Figure, "savefig", save_empty)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PPOCLI, "run_name", lambda cli: "version")  # not by task and seed, which differ between tests
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # as seed_everything(0) leaves it; monkeypatch takes back what tests set
    torch.manual_seed(0)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture
def fit(tmp_path):
    """Train a model quietly on the CPU; keywords go to the Trainer."""

    def run(model: PPO, ckpt_path=None, **kwargs) -> lightning.Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "default_root_dir": tmp_path,
        }
        trainer = lightning.Trainer(**{**defaults, **kwargs})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            trainer.fit(model, ckpt_path=ckpt_path)
        return trainer

    return run
