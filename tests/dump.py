"""A callback that writes down what every process ended with."""

from typing import Any

import torch
from lightning import LightningModule, Trainer

from ppo_lightning import PPOCallback


class Dump(PPOCallback):
    """``rank_R.pt`` in the working directory, at the end of training."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[int] = []
        self.first_observation: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.first_observation is None:
            self.first_observation = batch["observation"][0].clone()

    def on_update_end(self, trainer: Trainer, pl_module: Any, update: Any) -> None:
        self.updates.append(len(update.grad_norms))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        state = {
            "state_dict": pl_module.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict()["state"],
            "window": list(pl_module.rollouts.episodes.ep_info_buffer),
            "updates": self.updates,
            "first_observation": self.first_observation,
            "evaluated": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("eval/")},
        }
        torch.save(state, f"rank_{trainer.global_rank}.pt")
