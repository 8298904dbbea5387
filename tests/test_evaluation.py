import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from probes import ActionMustMatch, Endless, Faulty, Scripted, Uneven
from torch.testing import assert_close

from ppo_lightning import PPO, EnvironmentFault, InputError, evaluation
from ppo_lightning.evaluation import summarize


def episodes_of(model, n, **kwargs):
    """The episodes themselves, before they are summarised."""
    kept = []
    original = evaluation.summarize
    import ppo_lightning.ppo as module

    module.summarize = lambda episodes: kept.append(episodes) or original(episodes)
    try:
        model.evaluate(n, **kwargs)
    finally:
        module.summarize = original
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
    assert model._evaluate(10, True, "test") != model._evaluate(10, True, "evaluation")


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
