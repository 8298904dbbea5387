"""PopArt: the critic learns normalised targets, and says what it said when their statistics move."""

import math

import gymnasium as gym
import lightning
import pytest
import torch
from probes import ConstantReward
from torch import nn
from torch.testing import assert_close

from ppo_lightning import PPO, InputError, PopArt
from ppo_lightning.policy.moments import RunningMoments, ValueNormalizer

SMALL = {"num_envs": 4, "num_steps": 32, "total_steps": 512}


def test_the_critics_output_is_unchanged_when_its_statistics_move():
    normalizer = ValueNormalizer(beta=0.01)
    with torch.no_grad():
        normalizer.weight.fill_(0.7)
        normalizer.bias.fill_(-0.3)
    output = torch.randn(100).double()
    normalizer.weight.data, normalizer.bias.data = normalizer.weight.data.double(), normalizer.bias.data.double()
    for scale, shift in ((1.0, 0.0), (1000.0, 50.0), (0.5, -3000.0), (20.0, 1.0)):
        before = normalizer(output).detach()
        statistics = normalizer.mean.clone(), normalizer.std.clone()
        normalizer.merge(RunningMoments.batch_moments(torch.randn(64) * scale + shift))
        assert_close(normalizer(output), before, rtol=0, atol=1e-6 * float(normalizer.mean.abs() + normalizer.std))
        assert (normalizer.mean, normalizer.std) != statistics
        assert_close(
            normalizer.normalize(normalizer(output)), normalizer.normalized_value(output), rtol=1e-3, atol=1e-3
        )


def test_moments_are_exponentially_weighted_by_the_size_of_batches():
    normalizer = ValueNormalizer(beta=1e-3)
    batches = [torch.randn(n, dtype=torch.float64) * s + m for n, s, m in ((100, 1, 5), (400, 3, -2), (50, 2, 0))]
    mean, square = 0.0, 1.0
    for batch in batches:
        normalizer.merge(RunningMoments.batch_moments(batch))
        kept = (1 - 1e-3) ** len(batch)
        mean = kept * mean + (1 - kept) * batch.mean().item()
        square = kept * square + (1 - kept) * batch.square().mean().item()
        assert normalizer.mean.item() == pytest.approx(mean)
        assert normalizer.std.item() == pytest.approx((square - mean**2) ** 0.5)


def test_however_far_targets_jump_the_old_output_stays_within_reach():
    """|b| is at most √(share / (1 - share)), so the loss cannot explode."""
    normalizer = ValueNormalizer(beta=1e-4)
    normalizer.merge(RunningMoments.batch_moments(torch.full((1024,), 1e6)))
    assert normalizer.bias.abs() < 0.4


def test_ranks_merge_to_what_one_process_has():
    targets = torch.randn(90) * 7 + 3
    one, three = ValueNormalizer(0.01), ValueNormalizer(0.01)
    one.merge(RunningMoments.batch_moments(targets))
    three.merge(torch.stack([RunningMoments.batch_moments(part) for part in targets.split(30)]))
    assert_close(one.state_dict(), three.state_dict())


def test_targets_that_hardly_vary_are_not_blown_up():
    normalizer = ValueNormalizer(1e-4)
    for _ in range(20):
        normalizer.merge(RunningMoments.batch_moments(torch.full((50_000,), 4.0)))
    assert_close(normalizer.std, torch.tensor(normalizer.MIN_STD).double())


def test_the_output_is_preserved_in_training_and_the_loss_is_of_normalised_targets(fit):
    """The rollout's values are those of the critic after its statistics have taken in the rollout."""
    checked = []

    class Checked(PPO):
        def update(self, batch):
            values = self.policy.critic(self.policy.features(batch["observation"].flatten(0, 1)))
            assert_close(values.view(32, 4), batch["state_value"], rtol=1e-4, atol=1e-4)
            samples = self.training_samples(batch)
            normalizer = self.policy.value_normalizer
            assert_close(samples["value_target"] * normalizer.std.float() + normalizer.mean.float(),
                         batch["value_target"].flatten(), rtol=1e-4, atol=1e-3)  # fmt: skip
            _, _, value = self.policy.evaluate_actions(samples)
            assert_close(value, samples["state_value"], rtol=1e-3, atol=1e-3)  # both normalised: clipping compares them
            checked.append(True)
            return super().update(batch)

    lightning.seed_everything(0, verbose=False)
    fit(Checked("Pendulum-v1", popart=PopArt(1e-3), clip_range_vf=0.2, **SMALL))
    assert len(checked) == 4


class Scaled(ConstantReward):
    """The value of everything is 10,000."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, 1e4 * reward, *rest


@pytest.mark.parametrize("popart", [None, PopArt(1e-3)])
def test_a_value_of_ten_thousand_is_learnt_with_it_and_not_without(fit, popart):
    lightning.seed_everything(0, verbose=False)
    fast = lambda params: torch.optim.Adam(params, lr=1e-2)  # noqa: E731
    model = PPO(Scaled, popart=popart, optimizer=fast, num_minibatches=1, **{**SMALL, "total_steps": 4096})
    fit(model)
    value = model.policy.critic(torch.zeros(1, 1)).item()
    assert (abs(value - 1e4) < 200) == (popart is not None)


def test_it_is_saved_and_optimised(fit, tmp_path):
    model = PPO("CartPole-v1", popart=PopArt(1e-3), **SMALL)
    trainer = fit(model)
    normalizer = model.policy.value_normalizer
    assert {id(normalizer.weight), id(normalizer.bias)} <= {
        id(p) for p in trainer.optimizers[0].param_groups[0]["params"]
    }
    trainer.save_checkpoint(tmp_path / "popart.ckpt")
    again = PPO.load_from_checkpoint(tmp_path / "popart.ckpt")
    assert_close(again.policy.state_dict(), model.policy.state_dict(), rtol=0, atol=0)
    assert again.policy.value_normalizer.beta == 1e-3
    assert again.policy.value_normalizer.mean > 0


@pytest.mark.parametrize("beta", [0, 2.0, -1.0, math.nan, "much"])
def test_refuses_a_weight_that_is_none(beta):
    with pytest.raises(InputError, match=r"popart\.beta must lie between 0 and 1"):
        PopArt(beta)


def test_works_for_a_network_of_ones_own():
    class Own(nn.Module):
        def __init__(self, observation_space: gym.Space, action_space: gym.Space) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, observation):
            output = self.layer(observation)
            return output[:, :2], output[:, 2]

    model = PPO("CartPole-v1", policy=Own, popart=PopArt(), **SMALL)
    batch = model.rollouts.collect()
    before = model.policy.critic(batch["observation"][0])
    model.on_train_batch_start(batch, 0)
    assert model.policy.value_normalizer.std != 1
    assert_close(model.policy.critic(batch["observation"][0]), before, rtol=1e-4, atol=1e-4)
