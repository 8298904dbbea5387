import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lightning.pytorch.callbacks import EarlyStopping
from probes import ActionMustMatch, Endless, Faulty, Probe, Scripted, Uneven
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, EnvironmentFault, InputError
from ppo_lightning.callbacks import EvaluationCallback
from ppo_lightning.evaluation import episodes as evaluation
from ppo_lightning.evaluation.episodes import summarize


def episodes_of(model, n, **kwargs):
    """The episodes themselves, before they are summarised."""
    kept = []
    original = evaluation.summarize
    evaluation.summarize = lambda episodes: kept.append(episodes) or original(episodes)
    try:
        model.evaluate(n, **kwargs)
    finally:
        evaluation.summarize = original
    return kept[0]


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("num_episodes", [1, 3, 8, 20])
def test_exactly_n_episodes_with_the_returns_and_lengths_of_the_script(mode, num_episodes):
    script = ((3, "terminated"), (2, "truncated"))
    make = lambda num_envs: SyncVectorEnv([lambda: Scripted(script)] * num_envs, autoreset_mode=mode)  # noqa: E731
    model = PPO(make, num_envs=4)
    episodes = episodes_of(model, num_episodes)
    assert len(episodes) == num_episodes
    envs = min(4, num_episodes)
    row = 0
    for env in range(envs):
        for episode in range(num_episodes // envs + (env >= envs - num_episodes % envs)):
            length = script[episode % 2][0]
            assert episodes[row, 1] == length
            assert episodes[row, 0] == pytest.approx(sum(episode + 0.1 * s for s in range(1, length + 1)))
            row += 1
    assert row == num_episodes


def test_short_episodes_are_not_over_represented():
    """Half of all episodes take 1 step, half 50: the mean is 25.5. The first 200 to finish would have a mean of about 2."""
    model = PPO(Uneven, num_envs=50)
    model.seed = 0
    episodes = episodes_of(model, 400)
    assert episodes[:, 0].mean().item() == pytest.approx(25.5, abs=4)


def test_statistics():
    nan = torch.nan
    episodes = torch.tensor([[1.0, 5, 1, 0], [3.0, 7, 0, nan], [8.0, 9, nan, nan]], dtype=torch.float64)
    assert summarize(episodes) == {
        "eval/mean_reward": 4.0,
        "eval/std_reward": pytest.approx(np.std([1, 3, 8])),
        "eval/min_reward": 1.0,
        "eval/max_reward": 8.0,
        "eval/mean_ep_length": 7.0,
        "eval/success_rate": 0.5,
        "eval/fail_rate": 0.0,
    }
    assert {"eval/success_rate", "eval/fail_rate"}.isdisjoint(summarize(episodes[2:]))


def test_success_is_counted_where_the_environment_reports_it():
    statistics = PPO(ActionMustMatch, num_envs=4).evaluate(40)
    assert statistics["eval/success_rate"] == pytest.approx(statistics["eval/mean_reward"])


def test_evaluation_does_not_disturb_training(fit):
    """Not its environments, not its random numbers: with or without evaluations, the same run."""
    runs = []
    for limit in (0, 1.0):
        torch.manual_seed(0)
        model = PPO(
            "CartPole-v1", num_envs=4, num_steps=32, total_steps=1024, eval_interval=1, eval_deterministic=False
        )
        model.seed = 5
        fit(model, limit_val_batches=limit)
        runs.append(
            (
                model.state_dict(),
                torch.get_rng_state(),
                np.random.get_state()[1].tolist(),  # noqa: NPY002 - the global one is meant
            )
        )
    assert_close(runs[0][:2], runs[1][:2], rtol=0, atol=0)
    assert runs[0][2] == runs[1][2]


def test_the_same_policy_has_the_same_evaluation_and_another_step_other_episodes():
    model = PPO("CartPole-v1")
    model.seed = 3
    first = model.evaluate(10)
    assert model.evaluate(10) == first
    model.env_steps += 1
    assert model.evaluate(10) != first


def test_drawn_actions_differ_from_the_most_probable():
    model = PPO("CartPole-v1")
    model.seed = 3
    assert model.evaluate(10, deterministic=False) != model.evaluate(10, deterministic=True)
    sampling = PPO("CartPole-v1", eval_deterministic=False)
    sampling.policy.load_state_dict(model.policy.state_dict())
    sampling.seed = 3
    assert sampling.evaluate(10) == model.evaluate(10, deterministic=False)


def test_an_environment_without_end_is_cut_with_a_warning(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_EPISODE_STEPS", 50)
    model = PPO(lambda: Endless(10**9), num_envs=2)
    with pytest.warns(UserWarning, match="has not ended an evaluation episode within 50 steps"):
        statistics = model.evaluate(4)
    assert statistics["eval/mean_ep_length"] == 50


def test_a_vector_env_cannot_be_evaluated_unless_gymnasium_can_make_it_again(fit):
    model = PPO(SyncVectorEnv([Uneven] * 2), num_steps=32, total_steps=128)
    with pytest.raises(InputError, match="give a callable"):
        model.evaluate(2)
    fit(model, limit_val_batches=1.0)  # trains, without evaluations
    assert model.num_env_steps >= 128
    import gymnasium as gym

    assert PPO(gym.make_vec("CartPole-v1", 2)).evaluate(3)["eval/mean_ep_length"] > 0


def test_a_wrapped_vector_env_is_not_evaluated_without_its_wrappers():
    import gymnasium as gym

    wrapped = gym.wrappers.vector.TransformReward(gym.make_vec("CartPole-v1", 2), lambda reward: 100 * reward)
    with pytest.raises(InputError, match="give a callable"):
        PPO(wrapped).evaluate(2)


def test_the_result_does_not_depend_on_evaluations_before():
    model = PPO("CartPole-v1")
    model.seed = 3
    twenty = model.evaluate(20)
    model.evaluate(2)
    assert model.evaluate(20) == twenty


def test_test_episodes_are_not_those_that_chose_the_best_checkpoint():
    model = PPO("CartPole-v1")
    model.seed = 3
    assert model.evaluate(10, purpose="test") != model.evaluate(10)


@pytest.mark.parametrize(("fault", "key"), [("nan reward", "reward"), ("nan observation", "observation")])
def test_what_is_not_finite_is_an_error_in_evaluations_too(fault, key):
    model = PPO(lambda: Faulty(fault), num_envs=2)
    with pytest.raises(
        EnvironmentFault, match=f"environment 0 returned a {key} that is not finite at step 2 of an eval"
    ):
        model.evaluate(2)


def test_number_of_episodes_must_be_positive():
    with pytest.raises(InputError, match="num_episodes must be 1 or more, got 0"):
        PPO("CartPole-v1").evaluate(0)


class Corridor(Endless):
    """Ends where its length says so, else never; counts the steps of all."""

    def __init__(self, **attributes):
        super().__init__(10**9)
        vars(self).update(attributes)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_evaluation_takes_no_more_steps_than_training_where_nothing_ends(vectorization):
    model = PPO(Corridor, num_envs=2, num_steps=150, eval_interval=4, num_eval_episodes=4, vectorization=vectorization)
    with pytest.warns(UserWarning, match="has not ended an evaluation episode within 300 steps.*TimeLimit"):
        statistics = model.evaluate()
    model.close_environments()
    assert statistics["eval/mean_ep_length"] == 300
    assert statistics["eval/cut_episodes"] == 4
    assert statistics["eval/mean_reward"] == 300


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_after_a_cut_the_next_episode_begins_with_a_reset(mode, monkeypatch):
    monkeypatch.setattr(evaluation, "MIN_EPISODE_STEPS", 5)
    script = ((9, "terminated"), (2, "truncated"))
    make = lambda num_envs: SyncVectorEnv([lambda: Scripted(script)] * num_envs, autoreset_mode=mode)  # noqa: E731
    model = PPO(make, num_envs=2, num_steps=1, num_minibatches=1, eval_interval=1)
    with pytest.warns(UserWarning, match="within 5 steps"):
        episodes = episodes_of(model, 6)
    assert episodes[:, 1].tolist() == [5, 2, 5] * 2
    assert episodes[:, 4].tolist() == [1, 0, 1] * 2
    assert episodes[:3, 0].tolist() == pytest.approx([1.5, 2.3, 11.5])  # of the script's episodes 0, 1 and 2


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("name", ["max_steps", "max_episode_steps", "horizon"])
def test_an_environment_that_has_a_time_limit_is_not_cut(name, vectorization):
    if name == "horizon" and vectorization == "async":
        pytest.skip("two are enough")
    make = partial(Corridor, **{name: 130, "limit": 130})
    model = PPO(make, num_envs=2, num_steps=2, eval_interval=1, vectorization=vectorization)
    statistics = model.evaluate(2)
    model.close_environments()
    assert statistics["eval/mean_ep_length"] == 130
    assert "eval/cut_episodes" not in statistics


def test_a_time_limit_of_the_id_of_a_wrapper_or_of_tensors_is_known():
    import gymnasium as gym

    from ppo_lightning.envs.classic_control import CartPole

    limit = partial(gym.wrappers.TimeLimit, max_episode_steps=700)
    for options, expected in (
        ({"env": "CartPole-v1"}, 500),
        ({"env": "CartPole-v1", "vectorization": "vector_entry_point"}, 500),
        ({"env": Endless, "wrappers": [limit]}, 700),
        ({"env": partial(CartPole, max_episode_steps=90)}, 90),
        ({"env": "CliffWalking-v1"}, None),
    ):
        assert PPO(**options).env_provider.train_envs().time_limit() == expected


def test_episodes_that_were_cut_are_no_successes():
    nan = torch.nan
    episodes = torch.tensor([[1.0, 5, 1, 0, 0], [3.0, 9, nan, nan, 1], [3.0, 9, nan, nan, 1]], dtype=torch.float64)
    statistics = summarize(episodes)
    assert statistics["eval/success_rate"] == pytest.approx(1 / 3)
    assert statistics["eval/fail_rate"] == 0
    assert statistics["eval/cut_episodes"] == 2


def test_a_cut_is_reported_once(fit):
    model = PPO(Corridor, num_envs=2, num_steps=8, total_steps=64, eval_interval=1, num_eval_episodes=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, limit_val_batches=1.0)
    assert len([one for one in caught if "has not ended an evaluation episode" in str(one.message)]) == 1


class Draws(Probe):
    """Shows numbers of the streams that a process shares."""

    def __init__(self):
        super().__init__()
        self.observation_space = Box(0, 1, (3,), np.float64)

    def see(self, value):
        return np.array([random.random(), np.random.random(), torch.rand(()).item()])  # noqa: NPY002

    def step(self, action):
        return self.see(0.0), float(np.random.random()), np.random.random() < 0.2, False, {}  # noqa: NPY002


def shared_streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_what_environments_draw_from_shared_streams_is_the_same_in_each_evaluation_and_moves_no_stream(vectorization):
    model = PPO(Draws, num_envs=2, vectorization=vectorization)
    model.seed = 3
    before = shared_streams()
    first = model.evaluate(5)
    assert shared_streams() == before
    torch.rand(3), np.random.random(), random.random()  # noqa: NPY002
    assert model.evaluate(5) == first
    model.close_environments()


def test_a_run_whose_environments_draw_from_shared_streams_is_the_same_without_evaluations(fit):
    runs = []
    for limit in (0, 1.0):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
        model = PPO(Draws, num_envs=2, num_steps=16, total_steps=96, eval_interval=1, num_eval_episodes=2)
        model.seed = 5
        fit(model, limit_val_batches=limit)
        runs.append((model.state_dict(), shared_streams()))
    assert_close(runs[0][0], runs[1][0], rtol=0, atol=0)
    assert runs[0][1] == runs[1][1]


def test_steps_of_environments_without_episodes_left_do_not_count():
    """With one component that is the whole reward, its mean over episodes is that of the returns."""

    class Told(Uneven):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, reward, terminated, truncated, {**info, "reward_components": {"all": reward}}

    model = PPO(Told, num_envs=20)
    model.seed = 0
    found = model.evaluate(20)
    assert 5 < found["eval/mean_reward"] < 45
    assert found["eval/reward_components/all"] == pytest.approx(found["eval/mean_reward"])


def test_noise_of_gsde_is_kept_for_its_steps_in_evaluations_too(monkeypatch):
    drawn = []

    class Keeps(Endless):
        def __init__(self):
            super().__init__()
            self.action_space = Box(-1, 1, (1,))

        def step(self, action):
            return self.observation_space.low.astype(np.float32), 0.0, False, False, {}

    model = PPO(
        Keeps, num_envs=1, policy=partial(ActorCritic, distribution="gsde", sde_sample_freq=10, log_std_init=0.0)
    )
    model.seed = 0
    act = type(model.policy).act

    def watched(policy, observation, noise, *rest, **how):
        drawn.append(noise)
        return act(policy, observation, noise, *rest, **how)

    monkeypatch.setattr(type(model.policy), "act", watched)
    monkeypatch.setattr(evaluation, "MAX_EPISODE_STEPS", 150)
    with pytest.warns(UserWarning, match="has not ended an evaluation episode"):
        model.evaluate(1, deterministic=False)
    changes = [step for step in range(1, len(drawn)) if not torch.equal(drawn[step], drawn[step - 1])]
    assert changes[:12] == list(range(10, 130, 10))


def test_what_an_evaluation_does_not_log_is_not_that_of_an_earlier_one(fit, monkeypatch):
    model, seen = PPO("CartPole-v1", num_envs=2, num_steps=16, total_steps=96, num_minibatches=1, eval_interval=1), []
    more = iter([{"eval/cut_episodes": 1.0}, {}, {"eval/success_rate": 1.0}])  # what a run may log
    monkeypatch.setattr(model, "evaluate", lambda **_: {"eval/mean_reward": 1.0, **next(more)})

    class Hears(EvaluationCallback):
        def on_evaluation(self, trainer, pl_module, step, statistics):
            seen.append(set(statistics) - {"eval/mean_reward"})

    fit(model, callbacks=[Hears()], limit_val_batches=1)
    assert seen == [{"eval/cut_episodes"}, set(), {"eval/success_rate"}]


def test_a_run_that_is_to_stop_before_min_epochs_is_evaluated_at_its_interval(fit):
    model, seen = PPO("CartPole-v1", num_envs=2, num_steps=16, total_steps=960, num_minibatches=1, eval_interval=10), []

    class Hears(EvaluationCallback):
        def on_evaluation(self, trainer, pl_module, step, statistics):
            seen.append(pl_module.policy_version)

    stop = EarlyStopping("time/iterations", mode="max", stopping_threshold=5.0)
    fit(model, callbacks=[stop, Hears()], limit_val_batches=1, min_epochs=20)
    assert seen == [10, 20]
    assert model.policy_version == 20


def test_what_a_callback_logs_of_an_evaluation_may_be_monitored(fit):
    class Logs(EvaluationCallback):
        def on_evaluation(self, trainer, pl_module, step, statistics):
            pl_module.log_metrics({"my/score": -float(pl_module.policy_version)})

    model = PPO("CartPole-v1", num_envs=2, num_steps=16, total_steps=320, num_minibatches=1, eval_interval=2)
    stop = EarlyStopping("my/score", mode="max", patience=1)
    fit(model, callbacks=[Logs(), stop], limit_val_batches=1)
    assert model.policy_version < 10
