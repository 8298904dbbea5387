"""Games, not lives: what AtariVectorEnv says is put right, and the module clips what it learns from."""

import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from probes import learnt_rewards

from ppo_lightning import PPO, InputError
from ppo_lightning.envs import EnvFactory, EnvPool
from ppo_lightning.envs.third_party import AtariFullGames

ATARI = "ale_py.vector_env.AtariVectorEnv"
KWARGS = {"life_loss_info": True, "reward_clipping": False, "max_num_frames_per_episode": 4000}


def vector(game, num_envs, mode):
    from ppo_lightning.envs import resolve

    return EnvFactory(resolve(ATARI), {"game": game, "autoreset_mode": mode, **KWARGS})(num_envs)


class Brightness(torch.nn.Module):
    """A network that costs less than the games: logits and a value of the mean pixel."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.head = torch.nn.Linear(1, int(action_space.n) + 1)

    def forward(self, observation):
        output = self.head(observation.float().mean((1, 2, 3))[:, None])
        return output[:, :-1], output[:, -1]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_episodes_are_games_and_lost_lives_are_reported(mode):
    """In Breakout five lives are a game."""
    env = vector("breakout", 2, mode)
    assert isinstance(env, AtariFullGames)
    other = vector("pong", 1, "NextStep" if mode == "SameStep" else "SameStep")
    assert AutoresetMode(env.metadata["autoreset_mode"]).value == mode  # all instances share one dictionary
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    lives_lost, games = np.zeros(2, dtype=int), 0
    for _ in range(3000):
        _, _, terminated, truncated, info = env.step(rng.integers(0, 4, 2))
        lost = info.get("life_lost", np.zeros(2, dtype=bool))
        assert not (lost & terminated).any()
        lives_lost += lost
        for index in np.flatnonzero(terminated):
            assert lives_lost[index] == 4  # the fifth ends the game
            games += 1
        lives_lost[terminated | truncated] = 0
    assert games >= 4
    env.close()
    other.close()


def test_lost_lives_are_terminal_for_what_is_learnt_and_no_episodes_end():
    kwargs = {"game": "breakout", "autoreset_mode": "SameStep", **KWARGS}
    model = PPO(ATARI, kwargs, num_envs=4, num_steps=256, policy=Brightness)
    model.seed = 0
    scores, terminal = [], 0
    for _ in range(4):
        batch = model.rollouts.collect()
        terminal += int(batch["terminated"].sum())
        scores += model.rollouts.episodes.finished.tolist()
        assert batch["observation"].dtype == torch.uint8
        assert batch["observation"].shape == (256, 4, 4, 84, 84)
    assert scores
    assert terminal >= 4 * len(scores)
    model.close_environments()


def test_rewards_count_by_their_sign_and_returns_by_their_points():
    kwargs = {"game": "ms_pacman", "autoreset_mode": "SameStep", **KWARGS}
    model = PPO(ATARI, kwargs, num_envs=2, clip_reward=True, policy=Brightness)
    model.seed = 0
    batch = model.rollouts.collect()
    assert batch["reward"].max() >= 10
    scaled = learnt_rewards(model, batch["reward"], batch["terminated"], batch["valid"])
    assert set(scaled.unique().tolist()) == {0.0, 1.0}
    model.close_environments()


def test_the_same_seed_gives_the_same_rollout():
    batches = []
    for _ in range(2):
        torch.manual_seed(0)
        model = PPO(ATARI, {"game": "pong", "autoreset_mode": "SameStep", **KWARGS}, num_envs=2, num_steps=32)
        model.seed = 2**31 + 7  # beyond what the emulator takes as a seed
        batches.append(model.rollouts.collect())
        model.close_environments()
    assert torch.equal(batches[0]["observation"], batches[1]["observation"])
    assert torch.equal(batches[0]["action"], batches[1]["action"])


def test_envpool_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(InputError, match=r'pip install "ppo-lightning\[envpool\]"'):
        PPO("ppo_lightning.envs.EnvPool", {"task": "Pong-v5"})


class Pool:
    """As envpool is: spaces of one environment, a seed that only the constructor takes, players in its info."""

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(3)
    made: ClassVar[list[int]] = []

    def __init__(self, task, num_envs, seed):
        assert task == "Task-v0"
        self.num_envs = num_envs
        self.made.append(seed)
        self.random = np.random.default_rng(seed)

    def _see(self):
        return self.random.uniform(-1, 1, (self.num_envs, 2)).astype(np.float32), {"players": {"id": [0]}, "lives": 0}

    def reset(self):
        self.steps = 0
        return self._see()

    def step(self, actions):
        assert actions.dtype == np.int64
        self.steps += 1
        observation, info = self._see()
        over = np.full(self.num_envs, self.steps % 5 == 4)
        return observation, np.ones(self.num_envs, np.float32), over, np.zeros(self.num_envs, bool), info

    def close(self):
        pass


def test_envpools_vectors_are_seeded_and_batched(monkeypatch, fit):
    monkeypatch.setitem(sys.modules, "envpool", types.SimpleNamespace(make_gymnasium=Pool))
    env = EnvPool("Task-v0", 3)
    assert env.observation_space.shape == (3, 2)
    first, info = env.reset(seed=5)
    assert info == {"lives": 0}
    again, _ = env.reset(seed=5)
    other, _ = env.reset(seed=2**31 + 6)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert Pool.made[-1] == 6
    model = PPO("ppo_lightning.envs.EnvPool", {"task": "Task-v0"}, num_envs=3, num_steps=10, total_steps=40)
    fit(model)
    assert model.rollouts.collect()["valid"].sum() == 24  # NEXT_STEP: every fifth row is a reset
    assert model.evaluate(4)["eval/mean_ep_length"] == 4
