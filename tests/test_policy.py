import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import nn
from torch.testing import assert_close

from ppo_lightning import ActorCritic, InputError
from ppo_lightning.policy import Policy, RunningMoments
from ppo_lightning.policy.distributions import action_distribution


def test_categorical_samples_have_softmax_frequencies():
    distribution = action_distribution(Discrete(4))
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    noise = distribution.noise(400_000, generator=torch.Generator().manual_seed(0))
    frequency = distribution.sample(logits.expand(400_000, 4), noise).bincount(minlength=4) / 400_000
    assert_close(frequency, logits.softmax(0), atol=3e-3, rtol=0)
    assert distribution.mode(logits) == 3


def test_gaussian_samples_have_the_mean_and_deviation_that_parameters_say():
    distribution = action_distribution(Box(-1, 1, (2,)))
    parameters = torch.tensor([3.0, -1.0, 0.5, -2.0])
    noise = distribution.noise(400_000, generator=torch.Generator().manual_seed(0))
    samples = distribution.sample(parameters.expand(400_000, 4), noise)
    assert_close(samples.mean(0), parameters[:2], atol=1e-2, rtol=0)
    assert_close(samples.std(0), parameters[2:].exp(), atol=1e-2, rtol=0)
    assert_close(distribution.mode(parameters[None])[0], parameters[:2])


def test_layers_are_orthogonal_with_the_gains_of_ppo():
    network = ActorCritic(Box(-1, 1, (64,)), Discrete(8))
    halves = ((network.actor_trunk, network.action_head, 0.01), (network.critic_trunk, network.value_head, 1.0))
    for trunk, head, output_gain in halves:
        linear = [layer for layer in [*trunk.layers, head] if isinstance(layer, nn.Linear)]
        gains = [2**0.5, 2**0.5, output_gain]
        for layer, gain in zip(linear, gains, strict=True):
            rows = layer.weight @ layer.weight.T
            assert_close(rows, gain**2 * torch.eye(len(rows)), atol=1e-5, rtol=0)
            assert layer.bias.abs().max() == 0
    shared = {id(p) for p in network.actor_trunk.parameters()} & {id(p) for p in network.critic_trunk.parameters()}
    assert not shared


def test_log_std_does_not_depend_on_the_state():
    network = ActorCritic(Box(-1, 1, (4,)), Box(-1, 1, (2,)), log_std_init=-0.5)
    _, log_std = network.actor(torch.randn(10, 4)).chunk(2, -1)
    assert_close(log_std, torch.full((10, 2), -0.5))
    assert network.action_head.log_std.requires_grad


def test_moments_merge_to_those_of_all_samples():
    moments = RunningMoments((3,))
    samples = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]) + 1e3
    for part in samples.split([1, 10, 489, 500]):
        moments.merge(moments.batch_moments(part))
    assert_close(moments.mean, samples.mean(0))
    assert_close(moments.variance, samples.var(0, correction=0))
    assert moments.count == 1000


def test_moments_do_not_depend_on_how_samples_are_spread_over_ranks():
    samples = torch.randn(60, 2)
    one, two = RunningMoments((2,)), RunningMoments((2,))
    one.merge(one.batch_moments(samples))
    two.merge(torch.stack([two.batch_moments(part) for part in samples.split(20)]))
    assert_close(one.state_dict(), two.state_dict())


def test_count_is_exact_beyond_float32():
    moments = RunningMoments(())
    moments.count.fill_(2**24)
    moments.merge(moments.batch_moments(torch.zeros(1)))
    assert int(moments.count) == 2**24 + 1


def test_normalised_observations_are_clipped_at_ten():
    policy = Policy(Box(-1e6, 1e6, (2,)), Discrete(2), ActorCritic, normalize_observation=True)
    policy.moments.merge(policy.moments.batch_moments(torch.randn(10_000, 2) * 3 + 5))
    features = policy.features(torch.tensor([[5.0, 1e6], [8.0, -1e6]]))
    assert_close(features, torch.tensor([[0.0, 10.0], [1.0, -10.0]]), atol=0.1, rtol=0)


def test_discrete_observations_are_one_hot():
    policy = Policy(Discrete(3, start=5), Discrete(2), ActorCritic, normalize_observation=False)
    assert_close(policy.features(torch.tensor([5, 7])), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))


class Shared(nn.Module):
    """A network of one's own, with a shared trunk, from forward alone."""

    def __init__(self, observation_space, action_space, outputs=None):
        super().__init__()
        self.trunk = nn.Linear(observation_space.shape[0], 8)
        self.logits = nn.Linear(8, outputs or int(action_space.n))
        self.value = nn.Linear(8, 1)

    def forward(self, observation):
        hidden = self.trunk(observation).tanh()
        return self.logits(hidden), self.value(hidden).squeeze(-1)


def test_a_network_needs_forward_alone():
    policy = Policy(Box(-1, 1, (4,)), Discrete(3), Shared, normalize_observation=False)
    features = torch.randn(7, 4)
    parameters, value = policy(features)
    assert_close(policy.actor(features), parameters)
    assert_close(policy.critic(features), value)


def test_refuses_a_network_whose_output_does_not_fit():
    with pytest.raises(InputError, match=r"\(2, 9\).*Discrete\(3\) needs \(2, 3\)"):
        Policy(Box(-1, 1, (4,)), Discrete(3), lambda o, a: Shared(o, a, outputs=9), normalize_observation=False)


@pytest.mark.parametrize("space", [Dict({"a": gym.spaces.Text(2)}), gym.spaces.Text(3)])
def test_refuses_an_unknown_space(space):
    with pytest.raises(InputError, match="not supported"):
        Policy(space, Discrete(2), ActorCritic, normalize_observation=False)
    with pytest.raises(InputError, match="not supported"):
        Policy(Discrete(2), space, ActorCritic, normalize_observation=False)


def test_refuses_integer_box_actions():
    with pytest.raises(InputError, match="integer"):
        action_distribution(Box(0, 5, (1,), np.int64))


def test_refuses_to_normalise_what_has_no_mean():
    with pytest.raises(InputError, match="normalize_observation"):
        Policy(Discrete(3), Discrete(2), ActorCritic, normalize_observation=True)
