import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from tensordict import TensorDict
from torch.nn import functional
from torch.testing import assert_close

from ppo_lightning import PPO
from ppo_lightning.algorithm.loss import (
    LossCoefficients,
    PPOLoss,
    approximate_kl,
    clip_fraction,
    normalize_advantages,
)
from ppo_lightning.metrics import explained_variance, target_moments
from ppo_lightning.policy.distributions import action_distribution

DEFAULTS = {"clip_range": 0.2, "clip_range_vf": None, "vf_coef": 0.5, "ent_coef": 0.01}


def random_batch(size: int = 64, dims: int = 3) -> tuple[TensorDict, torch.Tensor]:
    """A batch, and network outputs that are some way from those that made it."""
    distribution = action_distribution(Box(-1, 1, (dims,)))
    old = torch.randn(size, 2 * dims) * 0.3
    action = distribution.sample(old, distribution.noise(size, generator=torch.default_generator))
    log_prob, _ = distribution.log_prob_and_entropy(old, action)
    batch = TensorDict(
        {
            "observation": torch.arange(float(size)),
            "action": action,
            "action_log_prob": log_prob,
            "advantage": torch.randn(size) * 3 + 1,
            "value_target": torch.randn(size),
            "state_value": torch.randn(size),
        },
        batch_size=[size],
    )
    return batch, (old + 0.1 * torch.randn_like(old)).requires_grad_()


def scored(batch, parameters, value, *, normalize=True, **changes):
    distribution = action_distribution(Box(-1, 1, (parameters.shape[1] // 2,)))

    def evaluate(batch):
        index = batch["observation"].long()
        return *distribution.log_prob_and_entropy(parameters[index], batch["action"]), value[index]

    if normalize:
        batch = batch.copy().set("advantage", normalize_advantages(batch["advantage"]))
    return PPOLoss()(batch, evaluate, LossCoefficients(**{**DEFAULTS, **changes}))


@pytest.mark.parametrize("clip_range_vf", [None, 0.1])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [1, 2, 64])
def test_equals_the_formulas_of_stable_baselines3(clip_range_vf, normalize, size):
    """The body of its PPO.train, with torch.distributions in place of its own."""
    torch.manual_seed(size)
    batch, parameters = random_batch(size)
    values = torch.randn(size, requires_grad=True)
    ours = scored(batch, parameters, values, clip_range_vf=clip_range_vf, normalize=normalize)

    mean, log_std = parameters.chunk(2, -1)
    distribution = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    log_prob, entropy = distribution.log_prob(batch["action"]), distribution.entropy()
    advantages = batch["advantage"]
    if normalize and len(advantages) > 1:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = torch.exp(log_prob - batch["action_log_prob"])
    policy_loss_1 = advantages * ratio
    policy_loss_2 = advantages * torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
    policy_loss = -torch.min(policy_loss_1, policy_loss_2).mean()
    if clip_range_vf is None:
        values_pred = values
    else:
        old = batch["state_value"]
        values_pred = old + torch.clamp(values - old, -clip_range_vf, clip_range_vf)
    value_loss = functional.mse_loss(batch["value_target"], values_pred)
    entropy_loss = -torch.mean(entropy)
    loss = policy_loss + 0.01 * entropy_loss + 0.5 * value_loss
    with torch.no_grad():
        log_ratio = log_prob - batch["action_log_prob"]
        approx_kl = torch.mean((torch.exp(log_ratio) - 1) - log_ratio)
        clipped = torch.mean((torch.abs(ratio - 1) > 0.2).float())

    assert_close(ours["loss"], loss)
    assert_close(ours["policy_gradient_loss"], policy_loss)
    assert_close(ours["value_loss"], value_loss)
    assert_close(ours["entropy_loss"], entropy_loss)
    assert_close(ours["approx_kl"], approx_kl)
    assert_close(ours["clip_fraction"], clipped)
    theirs = torch.autograd.grad(loss, [parameters, values], retain_graph=True)
    for mine, other in zip(torch.autograd.grad(ours["loss"], [parameters, values]), theirs, strict=True):
        assert_close(mine, other)


def test_the_old_policy_has_ratio_one_and_the_plain_policy_gradient():
    """At ratio 1 the gradient is that of -A log π, whatever the clip range."""
    batch, _ = random_batch()
    distribution = action_distribution(Box(-1, 1, (3,)))
    parameters = torch.randn(64, 6, requires_grad=True)
    log_prob, _ = distribution.log_prob_and_entropy(parameters, batch["action"])
    batch["action_log_prob"] = log_prob.detach()
    terms = scored(batch, parameters, torch.zeros(64), normalize=False, ent_coef=0.0)
    assert terms["approx_kl"] == 0
    assert terms["clip_fraction"] == 0
    expected = torch.autograd.grad(-(batch["advantage"] * log_prob).mean(), parameters)
    assert_close(torch.autograd.grad(terms["loss"], parameters), expected)


def test_a_sample_that_left_the_range_in_its_favour_pulls_no_more():
    batch, parameters = random_batch()
    batch["action_log_prob"] = torch.full((64,), -50.0)  # every ratio is huge
    batch["advantage"] = torch.ones(64)
    terms = scored(batch, parameters, torch.zeros(64), normalize=False, ent_coef=0.0, vf_coef=0.0)
    batch["action_log_prob"] = torch.full((64,), 10.0)  # every ratio is tiny: still pulled up
    pulled = scored(batch, parameters, torch.zeros(64), normalize=False, ent_coef=0.0, vf_coef=0.0)
    assert torch.autograd.grad(terms["loss"], parameters)[0].abs().max() == 0
    assert torch.autograd.grad(pulled["loss"], parameters)[0].abs().max() > 0
    assert terms["clip_fraction"] == 1


def test_equal_advantages_give_no_gradient_and_no_nan():
    batch, parameters = random_batch()
    batch["advantage"] = torch.full((64,), 7.0)
    terms = scored(batch, parameters, torch.zeros(64), ent_coef=0.0, vf_coef=0.0)
    assert_close(torch.autograd.grad(terms["loss"], parameters)[0], torch.zeros_like(parameters))


def test_normalized_advantages_have_mean_zero_and_deviation_one():
    advantage = normalize_advantages(torch.randn(1000) * 5 + 3)
    assert_close(advantage.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(advantage.std(), torch.tensor(1.0))
    assert normalize_advantages(torch.tensor([4.0])) == 4.0


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=20))
def test_approximate_kl_is_never_negative_and_zero_for_equal_policies(log_ratios):
    assert approximate_kl(torch.tensor(log_ratios, dtype=torch.float64)) >= -1e-16  # rounding of expm1
    assert approximate_kl(torch.zeros(3)) == 0


def test_approximate_kl_estimates_the_divergence_of_two_normals():
    """KL(N(0,1) ‖ N(m,1)) = m²/2."""
    x = torch.randn(1_000_000, dtype=torch.float64)
    shift = 0.3
    assert_close(approximate_kl(shift * x - shift**2 / 2), torch.tensor(shift**2 / 2).double(), rtol=2e-2, atol=0)


def test_clip_fraction_counts_both_sides():
    assert clip_fraction(torch.tensor([0.7, 0.9, 1.1, 1.3]), 0.2) == 0.5


def test_explained_variance_equals_stable_baselines3():
    value, target = torch.randn(2, 100)
    assert_close(
        explained_variance(target_moments(value, target)).item(),
        sb3_explained_variance(value.numpy(), target.numpy()),
        atol=1e-6,
        rtol=1e-5,
    )
    assert explained_variance(target_moments(target, target)) == 1


def test_explained_variance_of_a_constant_target_is_zero():
    value = torch.randn(100)
    assert explained_variance(target_moments(value, torch.ones(100))) == 0
    rounded = (1 - value) + value  # what gamma=0 makes of a reward of 1
    assert rounded.var() > 0
    assert explained_variance(target_moments(value, rounded)) == 0
    small = 1 + 1e-4 * torch.randn(100)
    assert_close(explained_variance(target_moments(small, small)).item(), 1.0)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_explained_variance_is_finite_without_discounted_future(env):
    model = PPO(env, num_envs=2, num_steps=64, gamma=0.0)
    optimizer = torch.optim.Adam(model.policy.parameters())
    explained = [model.learn(model.collect(), optimizer)["train/explained_variance"] for _ in range(3)]
    assert all(-10 < one <= 1 for one in explained)
    assert (env != "CartPole-v1") or explained == [0, 0, 0]  # each reward is 1


def test_explained_variance_of_several_processes_is_that_of_their_samples_together():
    value, target = torch.randn(2, 100) + torch.arange(100) / 10
    rows = torch.stack([target_moments(value[part], target[part]) for part in (slice(0, 30), slice(30, 100))])
    assert_close(explained_variance(rows), explained_variance(target_moments(value, target)))
