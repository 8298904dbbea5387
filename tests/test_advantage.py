import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3.common.buffers import RolloutBuffer
from torch.testing import assert_close

from ppo_lightning import generalized_advantage
from ppo_lightning.algorithm.advantage import discounted_return

NEVER = torch.zeros(16, 3, dtype=torch.bool)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_exact_critic_leaves_no_advantage(gae_lambda):
    """V = r / (1 - γ) solves Bellman's equation for a constant reward, so every δ and A is zero."""
    value = torch.full((16, 3), 2.0 / (1 - 0.9))
    reward = torch.full((16, 3), 2.0)
    advantage = generalized_advantage(reward, value, value, NEVER, NEVER, gamma=0.9, gae_lambda=gae_lambda)
    assert_close(advantage, torch.zeros(16, 3), atol=1e-4, rtol=0)


def test_monte_carlo_limit_is_a_geometric_sum():
    """V = 0, r = 1, λ = 1:  Aₜ = (1 - γ^(T-t)) / (1 - γ)."""
    zero = torch.zeros(16, 3)
    advantage = generalized_advantage(torch.ones(16, 3), zero, zero, NEVER, NEVER, gamma=0.9, gae_lambda=1.0)
    assert_close(advantage[:, 0], (1 - 0.9 ** torch.arange(16.0, 0, -1)) / (1 - 0.9))


def test_lambda_zero_is_the_td_error():
    reward, value, next_value = torch.randn(3, 16, 3)
    advantage = generalized_advantage(reward, value, next_value, NEVER, NEVER, gamma=0.9, gae_lambda=0.0)
    assert_close(advantage, reward + 0.9 * next_value - value)


def test_time_limit_bootstraps_and_a_terminal_state_does_not():
    one = torch.ones(1, 2)
    terminated, done = torch.tensor([[True, False]]), torch.tensor([[True, True]])
    advantage = generalized_advantage(one, one, 10 * one, terminated, done, gamma=0.5, gae_lambda=0.9)
    assert_close(advantage, torch.tensor([[0.0, 5.0]]))


def test_nothing_flows_back_over_the_end_of_an_episode():
    reward = torch.zeros(4, 1)
    reward[2:] = 100.0
    done = torch.tensor([[False], [True], [False], [False]])
    zero = torch.zeros(4, 1)
    advantage = generalized_advantage(reward, zero, zero, done, done, gamma=1.0, gae_lambda=1.0)
    assert_close(advantage[:2], torch.zeros(2, 1))


def test_environments_do_not_mix():
    """Permuting environments permutes advantages."""
    reward, value, next_value = torch.randn(3, 16, 5)
    done = torch.rand(16, 5) < 0.2
    order = torch.randperm(5)
    kwargs = {"gamma": 0.97, "gae_lambda": 0.9}
    whole = generalized_advantage(reward, value, next_value, done, done, **kwargs)
    permuted = generalized_advantage(*(x[:, order] for x in (reward, value, next_value, done, done)), **kwargs)
    assert_close(permuted, whole[:, order], rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_equals_stable_baselines3(seed):
    """Their buffer knows terminal states only; a time limit adds γ V(final observation) to the reward there."""
    rng = np.random.default_rng(seed)
    steps, envs, gamma, lam = 40, 6, 0.97, 0.9
    reward, value = rng.normal(size=(2, steps, envs)).astype(np.float32)
    done = rng.random((steps, envs)) < 0.15
    truncated = done & (rng.random((steps, envs)) < 0.5)
    final = rng.normal(size=(steps, envs)).astype(np.float32)
    last_value = rng.normal(size=envs).astype(np.float32)

    buffer = RolloutBuffer(steps, Box(-1, 1, (1,)), Discrete(2), device="cpu", gae_lambda=lam, gamma=gamma, n_envs=envs)
    starts = np.vstack([np.zeros((1, envs), bool), done[:-1]])
    for t in range(steps):
        buffer.add(
            np.zeros((envs, 1)),
            np.zeros((envs, 1)),
            reward[t] + gamma * final[t] * truncated[t],
            starts[t],
            torch.as_tensor(value[t]),
            torch.zeros(envs),
        )
    buffer.compute_returns_and_advantage(torch.as_tensor(last_value), done[-1])

    next_value = np.vstack([value[1:], last_value])
    next_value[done] = final[done]
    tensors = [torch.from_numpy(x) for x in (reward, value, next_value, done & ~truncated, done)]
    advantage = generalized_advantage(*tensors, gamma=gamma, gae_lambda=lam)
    assert_close(advantage, torch.from_numpy(buffer.advantages), rtol=1e-5, atol=1e-5)
    assert_close(advantage + tensors[1], torch.from_numpy(buffer.returns), rtol=1e-5, atol=1e-5)


def test_discounted_return_is_a_geometric_sum_that_restarts_with_the_episode():
    reward = torch.ones(6, 1)
    done = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool).unsqueeze(1)
    total, carry = discounted_return(reward, done, torch.tensor([0.5]), gamma=0.5)
    assert_close(total[:, 0], torch.tensor([1.5, 1.75, 1.875, 1.0, 1.5, 1.75]))
    assert_close(carry, torch.tensor([0.875]))


def test_discounted_return_does_not_see_where_a_rollout_was_cut():
    reward, done = torch.randn(20, 4), torch.rand(20, 4) < 0.2
    whole, end = discounted_return(reward, done, torch.zeros(4), gamma=0.9)
    first, carry = discounted_return(reward[:7], done[:7], torch.zeros(4), gamma=0.9)
    second, carry = discounted_return(reward[7:], done[7:], carry, gamma=0.9)
    assert_close(torch.cat([first, second]), whole)
    assert_close(carry, end)


def _recursions(dtype):
    """Inputs, and advantage and discounted return by plain Python numbers."""
    torch.manual_seed(1)
    gamma, lam, steps = 0.97, 0.93, 50
    reward, value, following = torch.randn(3, steps, 2, dtype=dtype)
    done = torch.rand(steps, 2) < 0.1
    terminated = done & (torch.rand(steps, 2) < 0.5)
    advantage, total = torch.zeros(steps, 2, dtype=torch.float64), torch.zeros(steps, 2, dtype=torch.float64)
    for n in range(2):
        tail = 0.0
        for t in reversed(range(steps)):
            delta = reward[t, n].item() + gamma * following[t, n].item() * (not terminated[t, n]) - value[t, n].item()
            tail = delta + gamma * lam * (not done[t, n]) * tail
            advantage[t, n] = tail
        tail = 0.0
        for t in range(steps):
            total[t, n] = reward[t, n].item() + tail
            tail = gamma * (not done[t, n]) * total[t, n].item()
    return (reward, value, following, terminated, done), gamma, lam, advantage, total


def test_float64_is_computed_in_float64():
    inputs, gamma, lam, advantage, total = _recursions(torch.float64)
    reward, done = inputs[0], inputs[-1]
    found = generalized_advantage(*inputs, gamma=gamma, gae_lambda=lam)
    assert_close(found, advantage, rtol=1e-14, atol=1e-14)
    found, carry = discounted_return(reward, done, torch.zeros(2, dtype=torch.float64), gamma=gamma)
    assert_close(found, total, rtol=1e-14, atol=1e-14)
    assert_close(carry, gamma * (~done[-1] * total[-1]), rtol=1e-14, atol=1e-14)


def test_the_dtype_is_that_of_the_inputs_whatever_the_default_is():
    inputs, gamma, lam, _, _ = _recursions(torch.float32)
    expected = generalized_advantage(*inputs, gamma=gamma, gae_lambda=lam)
    returns = discounted_return(inputs[0], inputs[-1], torch.zeros(2), gamma=gamma)
    torch.set_default_dtype(torch.float64)
    try:
        assert_close(generalized_advantage(*inputs, gamma=gamma, gae_lambda=lam), expected, rtol=0, atol=0)
        found = discounted_return(inputs[0], inputs[-1], torch.zeros(2, dtype=torch.float32), gamma=gamma)
        assert_close(found, returns, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_float32_equals_the_recursion_bit_for_bit():
    (reward, value, following, terminated, done), gamma, lam, _, _ = _recursions(torch.float32)
    delta = reward + gamma * following * ~terminated - value
    rows, tail = [], torch.zeros(2)
    for one, ended in zip(delta.flip(0), done.flip(0), strict=True):
        tail = torch.addcmul(one, gamma * lam * ~ended, tail)
        rows.append(tail)
    found = generalized_advantage(reward, value, following, terminated, done, gamma=gamma, gae_lambda=lam)
    assert_close(found, torch.stack(rows).flip(0), rtol=0, atol=0)
