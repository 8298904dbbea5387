"""Games, not lives: what AtariVectorEnv says is put right, and the module clips what it learns from."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from ppo_lightning import PPO
from ppo_lightning.envs import EnvMaker
from ppo_lightning.envs.third_party import Games

ATARI = "ale_py.vector_env.AtariVectorEnv"
KWARGS = {"life_loss_info": True, "reward_clipping": False, "max_num_frames_per_episode": 4000}


def vector(game, num_envs, mode):
    from ppo_lightning.envs import resolve

    return EnvMaker(resolve(ATARI), {"game": game, "autoreset_mode": mode, **KWARGS})(num_envs)


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_episodes_are_games_and_lost_lives_are_said(mode):
    """In Breakout five lives are a game."""
    env = vector("breakout", 2, mode)
    assert isinstance(env, Games)
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
    model = PPO(ATARI, {"game": "breakout", "autoreset_mode": "SameStep", **KWARGS}, num_envs=4, num_steps=256)
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
    model = PPO(ATARI, {"game": "ms_pacman", "autoreset_mode": "SameStep", **KWARGS}, num_envs=2, clip_reward=True)
    model.seed = 0
    batch = model.rollouts.collect()
    assert batch["reward"].max() >= 10
    scaled = model.scale_reward(batch["reward"], batch["terminated"], batch["valid"])
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


def test_envpool_is_named_where_it_is_not_installed():
    from ppo_lightning import InputError

    try:
        import envpool  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r'pip install "ppo-lightning\[envpool\]"'):
            PPO("ppo_lightning.envs.EnvPool", {"task": "Pong-v5"})
    else:
        model = PPO("ppo_lightning.envs.EnvPool", {"task": "CartPole-v1"}, num_envs=2, num_steps=32)
        assert model.rollouts.collect().shape == (32, 2)
