"""What training has made, to be compared to the bit."""

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor
from torch.testing import assert_close

from ppo_lightning import PPO


def outcome(model: PPO, trainer: Trainer) -> dict[str, Tensor]:
    """All of it: weights, moments, counters, the optimiser, and the rollout that would be next."""
    optimizer = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{index} {name}": value for index, state in optimizer.items() for name, value in state.items()}
    following = model.rollouts.collect()
    model.close_environments()
    rollout: dict[str, Any] = following.exclude("policy_version").flatten_keys(".").to_dict()
    window = torch.tensor(list(model.rollouts.episodes.ep_info_buffer))
    return {**model.state_dict(), **moments, **rollout, "window": window, "random": torch.get_rng_state()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Fail where anything differs, with its name."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert_close(value, second[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
