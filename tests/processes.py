"""Processes of a test, forked from it: what they need is imported already."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import multiprocessing

from ppo_lightning import PPO


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forked(function: Callable[[int], Any], world_size: int = 2, env: dict[str, Any] | None = None) -> list[Any]:
    """What ``function(rank)`` returns in each of several processes, or the text of what it raised; None of the dead.

    Args:
        function: may fit a model; Lightning takes the processes for ones that torchrun started.
        world_size: processes.
        env: environment variables by which Lightning knows its processes, with {rank}; the default are Lightning's own.
    """
    known = env or {"LOCAL_RANK": "{rank}", "NODE_RANK": "0", "WORLD_SIZE": str(world_size)}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    files = [Path(f"result_{rank}.pt").absolute() for rank in range(world_size)]

    def run(rank: int) -> None:
        os.environ.update(place, **{name: value.format(rank=rank) for name, value in known.items()})
        try:
            result = function(rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, files[rank])

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    results = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    for file in files:
        file.unlink(missing_ok=True)
    return results


def fit(model: PPO, **kwargs: Any) -> lightning.Trainer:
    """Train quietly, in one process or in those of :func:`forked`."""
    defaults = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
        "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    trainer = lightning.Trainer(**{**defaults, **kwargs})
    trainer.fit(model)
    return trainer
