"""A loop without a Trainer is the same training, to the bit."""

from typing import Any

import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv

from ppo_lightning import PPO, ActorCritic

SMALL: dict[str, Any] = {"num_envs": 4, "num_steps": 32, "total_steps": 512, "num_minibatches": 2, "update_epochs": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {"env": "CartPole-v1"},
    "normalised, in chunks, with a limit": {
        "env": "Pendulum-v1", "normalize_observation": True, "normalize_reward": True, "gradient_accumulation_steps": 3,
        "target_kl": 0.001, "popart": {"beta": 0.01}, "ent_coef": 0.01,
    },
    "with memory, from an environment class": {
        "env": CartPoleEnv, "policy": lambda *spaces: ActorCritic(*spaces, rnn="lstm", rnn_size=8), "sequence_length": 16,
    },
    "with a scheduler": {
        "env": "CartPole-v1", "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    },
}  # fmt: skip


class Kept(PPO):
    """Keeps the numbers of each iteration, but for wall-clock times."""

    def metrics(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        row = super().metrics(*args, **kwargs)
        self.rows = [*getattr(self, "rows", []), {key: value for key, value in row.items() if key not in TIMES}]
        return row


TIMES = {"time/time_elapsed", "time/iteration", "time/evaluate", "time/fps", "time/collect", "time/update"}


def make(variant: str, **options) -> Kept:
    torch.manual_seed(3)
    return Kept(**{**SMALL, **VARIANTS[variant], **options})


@pytest.mark.parametrize("variant", VARIANTS)
def test_collect_and_learn_give_the_weights_and_numbers_of_fit(fit, variant):
    fitted, model = make(variant), make(variant)
    fit(fitted)
    optimizer = model.optimizer(model.policy.parameters())
    scheduler = None if model.lr_scheduler is None else model.lr_scheduler(optimizer)
    while model.num_env_steps < model.total_steps:
        model.learn(model.collect(), optimizer)
        if scheduler is not None:
            scheduler.step()
    model.close_environments()
    assert model.rows == fitted.rows
    torch.testing.assert_close(model.state_dict(), fitted.state_dict(), rtol=0, atol=0)


@pytest.mark.long  # compiles
def test_a_compiled_loop_is_the_compiled_fit(fit):
    fitted, model = make("as it is", compile=True), make("as it is", compile=True)
    fit(fitted)
    optimizer = model.optimizer(model.policy.parameters())
    while model.num_env_steps < model.total_steps:
        model.learn(model.collect(), optimizer)
    model.close_environments()
    assert model.updater.compiled is not None
    torch.testing.assert_close(model.state_dict(), fitted.state_dict(), rtol=0, atol=0)


def test_an_evaluation_before_and_between_changes_nothing():
    models = [make("as it is"), make("as it is")]
    for evaluates, model in enumerate(models):
        optimizer = model.optimizer(model.policy.parameters())
        for _ in range(2):
            if evaluates:
                model.evaluate(2)
            model.learn(model.collect(), optimizer)
        model.close_environments()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_learning_counts_the_steps_and_the_next_rollout_is_the_new_policys():
    model = make("as it is")
    optimizer = model.optimizer(model.policy.parameters())
    rollout = model.collect()
    assert rollout["policy_version"] == 0
    model.learn(rollout, optimizer)
    assert model.collect()["policy_version"] == 1
    assert (int(model.iterations), model.num_env_steps) == (1, 128)
    model.close_environments()
