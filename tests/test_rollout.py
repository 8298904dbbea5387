from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from probes import DiscreteWorld, Endless, Scripted, Target, Uneven, learnt_rewards
from torch.testing import assert_close

from ppo_lightning import PPO, PPOLoss, generalized_advantage
from ppo_lightning.rollout.collectors import EpisodeEnds
from ppo_lightning.rollout.episodes import EpisodeStatistics
from ppo_lightning.runs.ranks import Ranks

MODES = list(AutoresetMode)


def vector(mode, num_envs=3, make=Scripted, **kwargs):
    return lambda: SyncVectorEnv([lambda: make(**kwargs)] * num_envs, autoreset_mode=mode)


def stepped_by(model: PPO) -> PPO:
    """A critic whose value is what it sees, so that a wrong observation shows in every number."""
    model.policy.critic = lambda features: features[:, 0].clone()
    forward = model.policy.forward
    model.policy.forward = lambda features: (forward(features)[0], features[:, 0].clone())
    return model


def advantages(mode, script, steps=24, rollouts=2):
    """(observation, advantage) of the steps of environment 0 whose episodes ended inside a rollout."""
    torch.manual_seed(0)
    model = stepped_by(PPO(vector(mode, script=script), num_steps=steps, num_minibatches=1, gamma=0.9, gae_lambda=0.8))
    seen = {}
    for _ in range(rollouts):
        batch = model.rollouts.collect()
        model.on_train_batch_start(batch, 0)
        done = batch["terminated"] | batch["truncated"]
        for env in range(3):
            ends = done[:, env].nonzero().flatten().tolist()
            last = ends[-1] if ends else -1
            for t in range(last + 1):
                if batch["valid"][t, env]:
                    seen[env, round(batch["observation"][t, env].item(), 4)] = batch["advantage"][t, env].item()
    return seen


SCRIPTS = {
    "mixed": ((3, "terminated"), (2, "truncated"), (5, "terminated"), (1, "truncated"), (4, "truncated")),
    "one step each": ((1, "truncated"), (1, "terminated")),
    "long": ((11, "truncated"),),
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_same_episodes_have_the_same_advantages_in_every_autoreset_mode(script):
    by_mode = {mode: advantages(mode, script) for mode in MODES}
    reference = by_mode[AutoresetMode.SAME_STEP]
    assert len(reference) > 10
    for mode, seen in by_mode.items():
        common = reference.keys() & seen.keys()
        assert len(common) >= min(len(reference), len(seen)) * 0.5, mode
        # an episode that a rollout's edge cuts has another tail, and edges fall differently where resets take a step
        whole = [key for key in common if not _cut(key, reference, seen)]
        assert len(whole) > 8
        for key in whole:
            assert seen[key] == pytest.approx(reference[key], abs=1e-6), (mode, key)


def _cut(key, *tables):
    """Whether some table lacks steps of the key's episode: a rollout's edge fell into it."""
    env, observation = key
    episode = int(observation + 1e-6)
    steps = [{k for k in table if k[0] == env and int(k[1] + 1e-6) == episode} for table in tables]
    return any(s != steps[0] for s in steps) or episode * 1.0 not in {k[1] for k in steps[0]}


def learn(model, batch):
    """Update the model on a rollout; the advantages of each minibatch."""
    seen = []

    class Sees(PPOLoss):
        def forward(self, batch, evaluate, coefficients):
            seen.append(batch["advantage"])
            return super().forward(batch, evaluate, coefficients)

    model.loss = Sees()
    model.learn(batch, torch.optim.SGD(model.parameters(), lr=0.0))
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_next_value_is_that_of_the_final_observation_never_of_the_reset(mode):
    model = stepped_by(PPO(vector(mode, script=SCRIPTS["mixed"]), num_steps=20, num_minibatches=1))
    batch = model.rollouts.collect()
    observation, valid = batch["observation"][..., 0], batch["valid"]
    # within episode k, step s is seen as k + s/100, and every step leads to the next one, the last included
    assert_close(batch["next_state_value"][valid], observation[valid] + 0.01, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_dummy_rows_reach_nothing(mode):
    model = PPO(vector(mode), num_steps=20, num_minibatches=1, normalize_observation=True, normalize_reward=True)
    batch = model.collect()
    dummies = int((~batch["valid"]).sum())
    assert (dummies > 0) == (mode is AutoresetMode.NEXT_STEP)
    samples = model.training_samples(batch)
    assert ("valid" in samples) == (dummies > 0)
    learnt = sum(len(one) for one in learn(model, batch))
    assert learnt == (60 - dummies) * model.updater.update_epochs
    assert int(model.policy.moments.count) == int(model.reward_normalizer.moments.count) == 60 - dummies
    assert_close(model.policy.moments.mean, batch["observation"][batch["valid"]].double().mean(0))
    assert model.num_env_steps == 60 - dummies
    lengths = [length for _, length, *_ in model.rollouts.episodes.ep_info_buffer]
    assert set(lengths) <= {3.0, 2.0, 5.0}


@pytest.mark.parametrize("mode", MODES)
def test_episode_statistics_are_those_of_the_script(mode):
    """Over rollouts shorter than an episode, too."""
    script = ((3, "terminated"), (2, "truncated"), (5, "terminated"))
    model = PPO(vector(mode, num_envs=2, script=script), num_steps=4, num_minibatches=1)
    for _ in range(12):
        learn(model, model.collect())
    window = list(model.rollouts.episodes.ep_info_buffer)
    assert len(window) >= 20
    for index, (total, length, *_) in enumerate(window):
        episode = index // 2  # both environments run the same script in step
        expected = script[episode % 3][0]
        assert length == expected
        assert total == pytest.approx(sum(episode + 0.1 * s for s in range(1, expected + 1)), abs=1e-4)


def test_episode_statistics_equal_a_loop_over_environments():
    rng = np.random.default_rng(0)
    statistics = EpisodeStatistics()
    statistics.restart(4)
    returns, lengths, expected = np.zeros(4), np.zeros(4), []
    for _ in range(5):
        reward = rng.normal(size=(7, 4)).astype(np.float32)
        done = rng.random((7, 4)) < 0.2
        valid = rng.random((7, 4)) < 0.9
        successes = []
        for t in range(7):
            returns += np.where(valid[t], reward[t], 0)
            lengths += valid[t]
            ended = np.flatnonzero(done[t])
            if len(ended):
                successes.append(np.stack([ended, -ended], 1).astype(float))
            for env in ended:
                expected.append((returns[env], lengths[env], float(env), -float(env)))
                returns[env] = lengths[env] = 0
        step, env = torch.from_numpy(done).nonzero(as_tuple=True)
        ends = EpisodeEnds(
            step, env, torch.zeros(0), None, torch.from_numpy(np.concatenate([*successes, np.zeros((0, 2))]))
        )
        statistics.add(torch.from_numpy(reward), torch.from_numpy(valid), ends)
        statistics.extend(statistics.finished)
    assert_close(
        torch.tensor(list(statistics.ep_info_buffer), dtype=torch.float64),
        torch.tensor(expected[-100:]),
        atol=1e-4,
        rtol=1e-5,
    )


def test_wrong_without_bootstrap_right_with_it(fit):
    """V = 1 / (1 - γ) = 10 in a world without end, though every episode is cut after 20 steps."""
    torch.manual_seed(0)
    model = PPO(
        lambda: Endless(20), num_envs=4, num_steps=50, total_steps=12_000, gamma=0.9, num_minibatches=4,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
    )  # fmt: skip
    fit(model)
    with torch.no_grad():
        value = model.policy.critic(torch.zeros(1, 1)).item()
    assert value == pytest.approx(10.0, abs=1.0)


def test_actions_are_stored_as_drawn_and_given_clipped():
    """Target asserts that its action space contains what it is given."""
    torch.manual_seed(0)
    model = PPO(Target, num_envs=4, num_steps=64)
    batch = model.rollouts.collect()
    assert (batch["action"].abs() > 1).any()


def test_discrete_spaces_that_start_elsewhere(fit):
    torch.manual_seed(0)
    model = PPO(DiscreteWorld, num_envs=4, num_steps=32, total_steps=6000, gamma=0.9)
    fit(model)
    assert model.predict(3) == 8
    assert model.predict(np.array([4, 5, 6])).tolist() == [8, 8, 8]
    assert model.evaluate(5)["eval/success_rate"] == 1.0


def test_length_is_one_and_asking_for_an_iterator_collects_nothing():
    model = PPO("CartPole-v1")
    assert len(model.rollouts) == 1
    iter(model.rollouts)
    assert model.rollouts.environments is None


def test_environments_have_seeds_of_their_own_on_every_rank():
    """seed + rank · num_envs + i: what Gymnasium gives environment i when it is reset with that seed."""
    model = PPO("CartPole-v1", num_envs=3, num_steps=8)
    model.seed = 7
    first = model.rollouts.collect()["observation"][0]
    expected = torch.stack([torch.from_numpy(gym.make("CartPole-v1").reset(seed=7 + i)[0]) for i in range(3)])
    assert_close(first, expected, rtol=0, atol=0)
    other = PPO("CartPole-v1", num_envs=3, num_steps=8)
    other.seed = 7
    other.ranks = Ranks(SimpleNamespace(global_rank=2, world_size=1))
    second = other.rollouts.collect()["observation"][0]
    expected = torch.stack([torch.from_numpy(gym.make("CartPole-v1").reset(seed=7 + 2 * 3 + i)[0]) for i in range(3)])
    assert_close(second, expected, rtol=0, atol=0)


@pytest.mark.parametrize("vectorization", ["sync", "async", "vector_entry_point"])
def test_every_vectorisation_collects(vectorization):
    model = PPO("CartPole-v1", num_envs=2, num_steps=30, vectorization=vectorization)
    batch = model.rollouts.collect()
    model.close_environments()
    assert batch.batch_size == (30, 2)
    assert batch["observation"].isfinite().all()


def test_sync_and_async_collect_the_same():
    batches = []
    for vectorization in ("sync", "async"):
        torch.manual_seed(0)
        model = PPO("CartPole-v1", num_envs=3, num_steps=64, vectorization=vectorization)
        model.seed = 1
        model.generator.manual_seed(1)
        batch = model.rollouts.collect()
        batches.append({key: batch[key].clone() for key in ("observation", "action", "reward", "next_state_value")})
        model.close_environments()
    assert_close(batches[0], batches[1], rtol=0, atol=0)


def test_wrappers_and_env_kwargs_reach_every_environment():
    model = PPO(
        "CartPole-v1",
        env_kwargs={"max_episode_steps": 5},
        wrappers=[lambda env: gym.wrappers.TransformReward(env, lambda reward: 3 * reward)],
        num_steps=10,
        num_envs=2,
    )
    batch = model.rollouts.collect()
    assert (batch["reward"] == 3).all()
    assert batch["truncated"][4].all()


def test_a_vector_env_is_used_as_it_is_and_left_open():
    env = SyncVectorEnv([Uneven] * 3)
    model = PPO(env, num_envs=8, num_steps=10)
    assert model.num_envs == 3
    model.rollouts.collect()
    model.close_environments()
    env.reset()
    assert model.rollouts.collect().batch_size == (10, 3)


def test_storage_is_allocated_once():
    model = PPO("CartPole-v1", num_envs=2, num_steps=10)
    first = model.rollouts.collect()["observation"].data_ptr()
    assert model.rollouts.collect()["observation"].data_ptr() == first


def test_normalised_rewards_have_the_scale_of_the_discounted_return_from_the_first_rollout_on():
    """Rewards in the tens of thousands would otherwise all be clipped to 10 in the first iteration."""
    torch.manual_seed(0)
    make = lambda: gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: 1e4 * reward)  # noqa: E731
    model = PPO(make, num_envs=4, num_steps=200, normalize_reward=True, gamma=0.9)
    batch = model.rollouts.collect()
    scaled = learnt_rewards(model, batch["reward"], batch["terminated"] | batch["truncated"], batch["valid"])
    assert (scaled.abs() < 10).all()
    deviation = float(model.reward_normalizer.moments.variance) ** 0.5
    assert_close(scaled * deviation, batch["reward"], rtol=1e-4, atol=1e-2)


def test_normalised_rewards_equal_gymnasiums_wrapper_on_the_moments():
    """The variance of the discounted return, over the same steps."""
    model = PPO(lambda: Endless(7), num_envs=1, num_steps=70, normalize_reward=True, gamma=0.9)
    batch = model.rollouts.collect()
    learnt_rewards(model, batch["reward"], batch["terminated"] | batch["truncated"], batch["valid"])
    returns = [sum(0.9**k for k in range(step + 1)) for step in range(7)] * 10
    assert float(model.reward_normalizer.moments.variance) == pytest.approx(np.var(returns), rel=1e-5)


def test_discounted_returns_continue_from_rollout_to_rollout():
    """The same moments, whether an endless episode is collected in one rollout or in four."""
    moments = []
    for steps, rollouts in ((80, 1), (20, 4)):
        model = PPO(lambda: Endless(10**9), num_envs=1, num_steps=steps, normalize_reward=True, gamma=0.99)
        for _ in range(rollouts):
            batch = model.rollouts.collect()
            learnt_rewards(model, batch["reward"], batch["truncated"], batch["valid"])
        moments.append(dict(model.reward_normalizer.moments.state_dict()))
    assert_close(moments[0], moments[1], rtol=1e-5, atol=1e-5)


def test_generalized_advantage_is_what_the_hook_writes():
    model = PPO("CartPole-v1", num_envs=2, num_steps=40, gamma=0.9, gae_lambda=0.7)
    batch = model.rollouts.collect()
    model.on_train_batch_start(batch, 0)
    done = batch["terminated"] | batch["truncated"]
    expected = generalized_advantage(
        batch["reward"], batch["state_value"], batch["next_state_value"], batch["terminated"], done,
        gamma=0.9, gae_lambda=0.7,
    )  # fmt: skip
    assert_close(batch["advantage"], expected, rtol=0, atol=0)
    assert_close(batch["value_target"], expected + batch["state_value"], rtol=0, atol=0)


def test_rollouts_need_no_trainer():
    model = PPO("CartPole-v1", num_envs=2, num_steps=8)
    with model.autocast():
        assert not torch.is_autocast_enabled("cpu")
    assert next(iter(model.rollouts)).batch_size == (8, 2)


def test_normalised_rewards_are_clipped_at_ten():
    """One reward a thousand times the others."""
    model = PPO("CartPole-v1", num_envs=1, num_steps=1000, normalize_reward=True, gamma=0.0)
    reward = torch.full((1000, 1), 1e-3)
    reward[500] = -1e3
    model.rollouts.running_return = torch.zeros(1)
    never = torch.zeros(1000, 1, dtype=torch.bool)
    assert learnt_rewards(model, reward, never, ~never).min() == -10
