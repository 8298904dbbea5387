"""Environments that are tensors: ours, and those of other packages."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import lightning
import numpy as np
import pytest
import simulators
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensordict import TensorDict
from torch import Tensor
from torch.testing import assert_close

from ppo_lightning import PPO, ActorCritic, InputError
from ppo_lightning.envs import IsaacLabVectorEnv, VectorEnvAdapter, mjlab_env
from ppo_lightning.envs.classic_control import CartPole, Pendulum
from ppo_lightning.errors import EnvironmentFault
from ppo_lightning.rollout.collectors import NumpyCollector, TensorCollector

SIZE = {"num_envs": 4, "num_steps": 32}


def parameters(model: PPO) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.parameters()])


# --- CartPole and Pendulum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "name"), [(CartPole, "CartPole-v1"), (Pendulum, "Pendulum-v1")])
def test_dynamics_are_gymnasiums(ours, name):
    """From 64 states far beyond where episodes begin, whatever the action."""
    vector, env = ours(64), gym.make(name).unwrapped
    torch.manual_seed(0)
    state = torch.randn(64, vector.initial_state(vector.reset_noise()).shape[1]) * 2
    action = torch.from_numpy(np.stack([env.action_space.sample() for _ in range(64)]))
    after, reward, terminated = vector.dynamics(state, action)
    observation = vector.observe(after)
    for index in range(64):
        env.reset()
        env.state = state[index].double().numpy()
        seen, given, ended, *_ = env.step(action[index].numpy() if action.ndim > 1 else int(action[index]))
        assert_close(observation[index], torch.from_numpy(seen), atol=2e-5, rtol=1e-4)
        assert float(reward[index]) == pytest.approx(float(given), abs=1e-4)
        assert bool(terminated[index]) == ended


@pytest.mark.parametrize(("ours", "name"), [(CartPole, "CartPole-v1"), (Pendulum, "Pendulum-v1")])
def test_spaces_and_first_states_are_gymnasiums(ours, name):
    env, vector = gym.make(name), ours(4096)
    assert vector.single_observation_space.shape == env.observation_space.shape
    assert vector.single_action_space == env.action_space
    first, _ = vector.reset(seed=1)
    theirs = np.stack([env.reset(seed=seed)[0] for seed in range(500)])
    assert_close(first.mean(0), torch.from_numpy(theirs).mean(0), atol=0.1, rtol=0)
    assert_close(first.std(0), torch.from_numpy(theirs).std(0), atol=0.05, rtol=0.1)
    assert_close(vector.reset(seed=1)[0], first, rtol=0, atol=0)
    assert not torch.equal(vector.reset(seed=2)[0], first)


def test_time_limits_truncate_and_reset_in_the_same_step():
    vector = CartPole(3, max_episode_steps=2)
    vector.reset(seed=0)
    vector.step(torch.zeros(3, dtype=torch.int64))
    observation, _, terminated, truncated, info = vector.step(torch.zeros(3, dtype=torch.int64))
    assert truncated.all()
    assert not terminated.any()
    assert (observation.abs() <= 0.05).all()
    assert (info["final_obs"][:, 1] < -0.3).all()
    assert vector.episode_step.tolist() == [0, 0, 0]


@pytest.mark.parametrize("env", [CartPole, Pendulum])
def test_tensors_and_arrays_train_the_same_bit_for_bit(fit, env, monkeypatch):
    ends, steppers = [], []
    for dense in (True, False):
        if not dense:
            reset = VectorEnvAdapter.reset

            def hidden(self, seed, reset=reset):
                observation = reset(self, seed)
                self.tensor_observation = None
                return observation

            monkeypatch.setattr(VectorEnvAdapter, "reset", hidden)
        lightning.seed_everything(1, verbose=False)
        model = PPO(partial(env, max_episode_steps=20), total_steps=512, normalize_reward=True, **SIZE)
        model.rollouts.start = lambda start=model.rollouts.start: steppers.append(start()) or steppers[-1]
        fit(model)
        ends.append((parameters(model), list(model.rollouts.episodes.ep_info_buffer)))
    assert [type(collector) for collector in steppers] == [TensorCollector, NumpyCollector]
    assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert repr(ends[0][1]) == repr(ends[1][1])


def test_nothing_is_copied_to_numpy_while_steps_are_taken(monkeypatch):
    model = PPO(CartPole, **SIZE)
    model.rollouts.collect()
    collector = model.rollouts.collector
    noise = model.policy.distribution.noise(32, 4, generator=torch.Generator())

    def refuse(*args, **kwargs):
        raise AssertionError("copied to numpy")

    for name in ("numpy", "__array__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    with torch.no_grad():
        collector.collect(model.policy, noise)


def test_storage_is_allocated_once_and_no_larger_than_what_it_holds():
    model = PPO(partial(CartPole, max_episode_steps=9), num_envs=64, num_steps=64)
    first = model.rollouts.collect()
    places = {key: first[key].data_ptr() for key in ("observation", "reward", "terminated")}
    second = model.rollouts.collect()
    assert {key: second[key].data_ptr() for key in places} == places
    collector = model.rollouts.collector
    held = [collector.observations, collector.final_observations, *collector.fields.values()]
    size = sum(leaf.untyped_storage().nbytes() for leaf in held)
    assert size <= 1.3 * sum(leaf[:64].numel() * leaf.element_size() for leaf in held)


def test_predict_and_evaluate_take_them(fit):
    model = PPO(partial(CartPole, max_episode_steps=30), total_steps=128, num_eval_episodes=6, **SIZE)
    fit(model, limit_val_batches=1)
    assert 5 < model.evaluate(6)["eval/mean_reward"] <= 30
    assert model.predict(np.zeros(4, np.float32)) in (0, 1)


def test_policies_with_memory_and_dict_actions_take_them(fit):
    model = PPO(partial(Pendulum, max_episode_steps=9), total_steps=256, policy=remembering, **SIZE)
    fit(model)
    assert model.num_env_steps == 256


def remembering(observation_space, action_space):
    return ActorCritic(observation_space, action_space, rnn="gru", distribution="tanh")


# --- vectors of other packages -----------------------------------------------------------------------------------------


class Counter(VectorEnv):
    """Observes how many steps the episode has; ends by time after ``limits``. ManiSkill's manners, where asked for."""

    def __init__(self, num_envs: int, limits=(3, 4, 5, 6), maniskill: bool = True, lacks: bool = False) -> None:
        self.num_envs, self.maniskill, self.lacks, self.auto_reset = num_envs, maniskill, lacks, True
        self.metadata = {} if maniskill else {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = Box(-1, 1, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.limits = torch.tensor(limits)

    def reset(self, *, seed=None, options=None):
        self.count = torch.zeros(self.num_envs)
        return self.count[:, None].clone(), {}

    def step(self, actions):
        assert isinstance(actions, Tensor)
        assert actions.shape == (self.num_envs, 2)
        self.count += 1
        final, truncated = self.count[:, None].clone(), self.count >= self.limits
        success, reward = self.count % 2 == 0, self.count.clone()
        self.count[truncated] = 0
        info = {}
        if truncated.any() and not self.lacks:
            name = "final_observation" if self.maniskill else "final_obs"
            info = {name: final, "final_info": {"success": success}}
        return self.count[:, None].clone(), reward, torch.zeros(self.num_envs, dtype=torch.bool), truncated, info


@pytest.mark.parametrize("maniskill", [True, False])
def test_final_observations_and_success_are_those_of_the_step(maniskill, monkeypatch):
    if maniskill:
        monkeypatch.setitem(sys.modules, "mani_skill", ModuleType("mani_skill"))
        monkeypatch.setattr(Counter, "__module__", "mani_skill.vector")
    model = PPO(partial(Counter, maniskill=maniskill), **SIZE)
    batch = model.rollouts.collect()
    assert isinstance(model.rollouts.collector, TensorCollector)
    step, env = batch["truncated"].nonzero(as_tuple=True)
    assert len(step) > 20
    lasts = model.policy.critic(torch.tensor([3.0, 4.0, 5.0, 6.0])[env, None])
    assert_close(batch["next_state_value"][step, env], lasts)
    episodes = model.rollouts.episodes
    lengths = episodes.finished[:, 1]
    assert_close(episodes.finished[:, 0], lengths * (lengths + 1) / 2)
    assert_close(episodes.finished[:, 2], (lengths % 2 == 0).double())


def test_a_maniskill_vector_must_reset_by_itself(monkeypatch):
    monkeypatch.setattr(Counter, "__module__", "mani_skill.vector")

    def manual(num_envs):
        vector = Counter(num_envs)
        vector.auto_reset = False
        return vector

    with pytest.raises(InputError, match="auto_reset=True"):
        PPO(manual, **SIZE)


def test_a_vector_that_hides_its_final_observations_is_refused():
    with pytest.raises(EnvironmentFault, match=r"gives no info\['final_obs'\]"):
        PPO(partial(Counter, maniskill=False, lacks=True), **SIZE).rollouts.collect()


def test_what_is_not_finite_is_named():
    class Broken(Counter):
        def step(self, actions):
            observation, reward, *rest = super().step(actions)
            reward[2] = torch.where(self.count[2] == 2, torch.nan, reward[2])
            return observation, reward, *rest

    with pytest.raises(EnvironmentFault, match="environment 2 returned a reward that is not finite at step 1"):
        PPO(partial(Broken, maniskill=False), **SIZE).rollouts.collect()


class Simulation:
    """A VecEnv of rsl_rl, whose buffers it writes over; ends by time after 5 steps, else by falling after 3."""

    num_actions, device, max_episode_length = 2, "cpu", 5

    def __init__(self, num_envs: int, grouped: bool = False) -> None:
        self.num_envs, self.grouped = num_envs, grouped
        self.count = torch.zeros(num_envs)
        self.limit = torch.where(torch.arange(num_envs) % 2 == 0, 5, 3)
        self.buffer = torch.zeros(num_envs, 1)

    def get_observations(self):
        self.buffer[:, 0] = self.count
        if self.grouped:
            return TensorDict({"policy": self.buffer, "critic": self.buffer * 2}, [self.num_envs])
        return self.buffer

    def reset(self):
        self.count[:] = 0
        return self.get_observations(), {}

    def step(self, actions):
        assert actions.shape == (self.num_envs, 2)
        self.count += 1
        done = self.count >= self.limit
        self.count[done] = 0
        return self.get_observations(), torch.ones(self.num_envs), done.long(), {"time_outs": done & (self.limit == 5)}


def test_rsl_rls_time_limits_bootstrap_from_the_observation_before():
    model = PPO(Simulation, **SIZE)
    batch = model.rollouts.collect()
    assert isinstance(model.rollouts.collector, TensorCollector)
    assert_close(batch["observation"][:6, :2, 0], torch.tensor([[0.0, 0], [1, 1], [2, 2], [3, 0], [4, 1], [0, 2]]))
    assert batch["terminated"][:6, :2].tolist() == [[False, False]] * 2 + [[False, True]] + [[False] * 2] * 2 + [
        [False, True]
    ]
    assert batch["truncated"][:6, :2].tolist() == [[False, False]] * 4 + [[True, False]] + [[False, False]]
    assert_close(batch["next_state_value"][4, 0], batch["state_value"][4, 0])


class Shows(Simulation):
    """Shows what its episodes end with, and logs: ``name`` of the key, ``form`` of what is in it."""

    def __init__(self, num_envs, name="final_obs", form="tensor", grouped=False):
        super().__init__(num_envs, grouped)
        self.name, self.form = name, form
        self.extras: dict = {}

    def step(self, actions):
        last = (self.count + 1)[:, None]
        observation, reward, done, extras = super().step(actions)
        groups = {"policy": last, "critic": last * 2}
        shown: object = groups if self.grouped else last
        if self.form == "objects":
            shown = np.full(self.num_envs, None, dtype=object)
            for index in done.nonzero()[:, 0].tolist():
                shown[index] = {name: part[index] for name, part in groups.items()} if self.grouped else last[index]
        elif self.form == "some":
            shown = {"policy": last}
        elif self.form == "wrong":
            shown = last[:1]
        elif self.form == "TensorDict":
            shown = TensorDict(groups, [self.num_envs])
        if done.any():  # Isaac Lab keeps one dictionary, and replaces these where episodes end
            self.extras |= {self.name: shown, "log": {"Episode_Reward/track": last.mean(), "Curriculum/level": 2}}
        return (
            observation,
            reward,
            done,
            {**self.extras, **extras, "reward_components": {"alive": torch.ones(self.num_envs)}},
        )


@pytest.mark.parametrize("name", ["final_obs", "final_observation"])
@pytest.mark.parametrize(
    ("form", "grouped"),
    [("tensor", False), ("objects", False), ("tensor", True), ("objects", True), ("TensorDict", True)],
)
@pytest.mark.parametrize("memory", [None, "gru"])
def test_time_limits_bootstrap_from_the_final_observations_that_a_simulator_shows(name, form, grouped, memory):
    keys = {"actor_keys": ["policy"], "critic_keys": ["policy", "critic"]} if grouped else {}
    policy = partial(ActorCritic, rnn=memory, **keys)
    model = PPO(partial(Shows, name=name, form=form, grouped=grouped), policy=policy, **SIZE)
    batch = model.rollouts.collect()
    assert batch["truncated"][4, 0]
    assert batch["terminated"][2, 1]
    assert isinstance(model.rollouts.collector, TensorCollector if memory is None else NumpyCollector)
    if memory is None:
        last = torch.tensor([[5.0]])
        seen = {"policy": last, "critic": 2 * last} if grouped else last
        assert_close(batch["next_state_value"][4, :1], model.policy.critic(seen))
    else:
        assert not torch.equal(batch["next_state_value"][4, 0], batch["state_value"][4, 0])


def test_groups_that_a_simulator_does_not_show_are_those_of_the_observation_before():
    policy = partial(ActorCritic, actor_keys=["policy"], critic_keys=["policy", "critic"])
    model = PPO(partial(Shows, form="some", grouped=True), policy=policy, **SIZE)
    batch = model.rollouts.collect()
    value = model.policy.critic({"policy": torch.tensor([[5.0]]), "critic": torch.tensor([[8.0]])})
    assert_close(batch["next_state_value"][4, :1], value)


def test_final_observations_of_another_shape_are_refused():
    with pytest.raises(EnvironmentFault, match=r"Shows gave final observations \(1, 1\) .*give a tensor \(4, 1\)"):
        PPO(partial(Shows, form="wrong"), **SIZE).rollouts.collect()


def test_what_simulators_log_is_logged():
    class Logs(Simulation):
        def step(self, actions):
            *others, extras = super().step(actions)
            log = {
                "Episode_Reward/track": torch.tensor(0.5), "Curriculum/level": 2, "/per_env": torch.arange(4.0),
                "ended": torch.tensor([1.0, 2.0]), "none": torch.zeros(0), "text": "fine", "nothing": None,
            }  # fmt: skip
            components = {"alive": torch.ones(4)}
            return *others, {**extras, "log": log, "episode": {"rew": torch.ones(1)}, "reward_components": components}

    class Both(Logs):
        def step(self, actions):
            *others, extras = super().step(actions)
            return *others, {**extras, "observations": {"critic": torch.zeros(4, 1)}, "log": None, "final_obs": None}

    model = PPO(Logs, **SIZE)
    model.rollouts.collect()
    means = {name: total / number for name, (total, number) in model.rollouts.info_sums.items()}
    assert means == pytest.approx(
        {
            "env/Episode_Reward/track": 0.5, "env/Curriculum/level": 2.0, "env/per_env": 1.5, "env/ended": 1.5,
            "env/rew": 1.0, "reward/alive": 1.0, "reward_components/alive": means["reward_components/alive"],
        }
    )  # fmt: skip
    assert 3 <= means["reward_components/alive"] <= 5
    model = PPO(Both, **SIZE)
    model.rollouts.collect()
    assert model.rollouts.info_sums.keys() == {"env/rew", "reward/alive", "reward_components/alive"}
    assert model.evaluate(2)["eval/env/rew"] == 1.0


def test_rsl_rls_groups_are_parts_of_a_dict(fit):
    policy = partial(ActorCritic, actor_keys=["policy"], critic_keys=["policy", "critic"])
    model = PPO(partial(Simulation, grouped=True), total_steps=256, policy=policy, **SIZE)
    assert model.observation_space.keys() == {"policy", "critic"}
    fit(model)
    assert model.num_env_steps == 256


class Lab(gym.Env):
    """An environment of Isaac Lab: one gymnasium.Env that is many, on tensors."""

    shows = False

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.device = num_envs, "cpu"
        self.single_observation_space = Dict({"policy": Box(-np.inf, np.inf, (1,), np.float32)})
        self.single_action_space = Box(-np.inf, np.inf, (1,), np.float32)
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.count = torch.zeros(self.num_envs, 1)
        return {"policy": self.count}, {}

    def step(self, action):
        self.count = (self.count + 1) % 4
        over = self.count[:, 0] == 0
        extras = {"final_obs": {"policy": torch.full_like(self.count, 4.0)}} if self.shows else {}
        return {"policy": self.count}, action[:, 0], torch.zeros_like(over), over, extras


def test_isaac_labs_final_observations_are_used():
    class Shows(Lab):
        shows = True

    model = PPO(lambda num_envs: Shows(num_envs), **SIZE)
    batch = model.rollouts.collect()
    assert batch["truncated"][3].all()
    assert_close(batch["next_state_value"][3], model.policy.critic({"policy": torch.full((4, 1), 4.0)}))


def test_isaac_labs_environments_are_vectors(fit):
    made = []
    model = PPO(lambda num_envs: made.append(Lab(num_envs)) or made[-1], total_steps=256, **SIZE)
    fit(model)
    assert made[0].seeds == [0]
    assert [episode[1] for episode in model.rollouts.episodes.ep_info_buffer][:4] == [4.0] * 4


@pytest.mark.parametrize(
    ("env", "task", "final"),
    [("mjlab_env", simulators.MJLAB_TASKS[0], 3.0), ("isaac_lab_env", simulators.ISAAC_TASK, 4.0)],
)
def test_tasks_of_simulators_train_by_name(env, task, final, fit, monkeypatch):
    """Isaac Lab gives the observation at which a time limit cuts; mjlab's values bootstrap from the one before."""
    started = simulators.install(monkeypatch)
    model = PPO(f"ppo_lightning.envs.{env}", {"task": task}, total_steps=256, **SIZE)
    rollout = model.rollouts.collect()
    assert rollout["truncated"][3].all()
    group = next(iter(model.observation_space))
    observation = {name: torch.full((4, 2), final) for name in model.observation_space}
    assert_close(rollout["observation"][group][:5, 0, 0], torch.tensor([0.0, 1, 2, 3, 0]))
    assert_close(rollout["next_state_value"][3], model.policy.critic(observation))
    assert model.rollouts.info_sums.keys() == {"env/Metrics/speed"}
    fit(model)
    trainer = fit(model)  # with a simulation of its own, in the same app
    trainer.save_checkpoint("last.ckpt")
    assert PPO.load_from_checkpoint("last.ckpt").env_factory.env_kwargs == {"task": task}
    assert [start["headless"] for start in started] == [True] * (env == "isaac_lab_env")


def test_simulators_differ_between_ranks_from_the_start(monkeypatch):
    simulators.install(monkeypatch)
    torch.manual_seed(3)
    seeds = []
    for name, rank in (("RANK", "0"), ("RANK", "1"), ("SLURM_PROCID", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, rank)
            seeds.append(mjlab_env(simulators.MJLAB_TASKS[0], 2).simulator.cfg.seed)
    assert seeds == [3, 4, 5]


def test_a_time_limit_of_a_finite_task_is_terminal():
    simulator = simulators.Mjlab(SimpleNamespace(scene=SimpleNamespace(num_envs=2), is_finite_horizon=True), "cpu")
    env = IsaacLabVectorEnv(simulator)
    env.reset(seed=2**40)
    ends = [env.step(torch.zeros(2, 3))[2:4] for _ in range(4)]
    assert [terminated.all() for terminated, _ in ends] == [False] * 3 + [True]
    assert not any(truncated.any() for _, truncated in ends)


@pytest.mark.parametrize(
    ("env", "task", "sentence"),
    [
        ("mjlab_env", "Mjlab-Cartpole-Balanc", "Mjlab-Cartpole-Balanc: did you mean Mjlab-Cartpole-Balance?"),
        ("mjlab_env", "xyz", "mjlab has no task xyz: it has Mjlab-Cartpole-Balance, Mjlab-Velocity-Flat-Unitree-Go1"),
        ("isaac_lab_env", "Isaac-Velocity-Flat-Anymal-C", "did you mean Isaac-Velocity-Flat-Anymal-C-v0?"),
    ],
)
def test_a_wrong_task_is_one_sentence(env, task, sentence, monkeypatch):
    simulators.install(monkeypatch)
    with pytest.raises(InputError, match=sentence):
        PPO(f"ppo_lightning.envs.{env}", {"task": task})


@pytest.mark.parametrize(("env", "install"), [("mjlab_env", "pip install mjlab"), ("isaac_lab_env", "isaaclab.sh -p")])
def test_a_simulator_that_is_not_installed_is_one_sentence(env, install, monkeypatch):
    simulators.hide(monkeypatch)
    with pytest.raises(InputError, match=f"xyz needs .*{install}"):
        PPO(f"ppo_lightning.envs.{env}", {"task": "xyz"})


def test_mjlab_itself_trains(fit):
    pytest.importorskip("mjlab")
    model = PPO("ppo_lightning.envs.mjlab_env", {"task": "Mjlab-Cartpole-Balance"}, total_steps=256, **SIZE)
    fit(model)
    assert model.num_env_steps == 256
    assert model.observation_space.keys() == {"actor", "critic"}


def test_jax_environments_come_by_dlpack(fit):
    pytest.importorskip("jax", reason="needs gymnasium[jax]")
    pytest.importorskip("array_api_compat", reason="needs gymnasium[jax]")
    from gymnasium.envs.phys2d.cartpole import CartPoleJaxVectorEnv
    from gymnasium.wrappers.vector import JaxToTorch

    model = PPO(lambda num_envs: JaxToTorch(CartPoleJaxVectorEnv(num_envs)), total_steps=256, **SIZE)
    fit(model)
    assert model.num_env_steps >= 256


# --- double-buffered workers --------------------------------------------------------------------------------------------


def test_one_half_of_the_workers_steps_while_the_policy_serves_the_other(monkeypatch):
    log = []
    for name in ("step_async", "step_wait"):
        call = getattr(VectorEnvAdapter, name)

        def noted(self, *args, name=name, call=call):
            log.append((name, self._first))
            return call(self, *args)

        monkeypatch.setattr(VectorEnvAdapter, name, noted)
    model = PPO("CartPole-v1", num_envs=3, num_steps=8, vectorization="async")
    model.seed = 0
    batch = model.rollouts.collect()
    model.close_environments()
    both = [("step_wait", 0), ("step_async", 0), ("step_wait", 2), ("step_async", 2)]
    assert log == [("step_async", 0), ("step_async", 2), *both * 7, ("step_wait", 0), ("step_wait", 2)]
    assert batch.shape == (8, 3)
