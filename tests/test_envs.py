import copy
import dataclasses
import functools
import multiprocessing
import random
import re
import time
from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import lightning
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from probes import Endless, Faulty, Probe, Scripted

from ppo_lightning import PPO, EnvironmentFault, InputError
from ppo_lightning.envs import EnvFactory, RestartBudget, VectorEnvAdapter
from ppo_lightning.envs.classic_control import CartPole

CartPoles = partial(gym.make, "CartPole-v1", disable_env_checker=True)
SMALL = {"num_envs": 3, "num_steps": 16, "total_steps": 96, "num_minibatches": 2}


class FaultyOnlyIn(Faulty):
    """Wrong in one environment of several: the one whose seed says so."""

    def __init__(self, fault, index, where="step"):
        super().__init__(fault, where=where, spare_first_reset=True)
        self.index, self.mine = index, False

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.mine = seed == 100 + self.index
        if not self.mine:
            self.fault, kept = "none", self.fault
            self.steps = 0
            self.resets += 1
            self.kept = kept
            return self.see(0.0), {}
        return super().reset(seed=seed)

    def step(self, action):
        if not self.mine:
            self.steps += 1
            return self.see(0.0), 1.0, False, self.steps >= 5, {}
        return super().step(action)


def faulty(fault, index=1, where="step"):
    return functools.partial(FaultyOnlyIn, fault, index, where)


def run(model, fit):
    model.seed = 100
    before = [p.detach().clone() for p in model.policy.parameters()]
    with pytest.raises(EnvironmentFault) as caught:
        fit(model)
    for old, new in zip(before, model.policy.parameters(), strict=True):
        assert torch.equal(old, new)  # nothing reached the parameters
    assert model.rollouts.environments is None  # closed
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")  # Gymnasium reports a worker's error as a warning, too
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("where", ["step", "reset"])
def test_an_environment_that_raises_is_named_with_its_own_traceback(fit, vectorization, where):
    started = time.monotonic()
    message = run(PPO(faulty("raise", where=where), vectorization=vectorization, **SMALL), fit)
    assert message.startswith(f"environment 1 raised ZeroDivisionError in {where}: the pole is at infinity")
    assert "probes.py" in message
    assert "raise ZeroDivisionError" in message
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("fault", "key", "step"),
    [
        ("nan observation", "observation", 3),
        ("inf observation", "observation", 3),
        ("nan reward", "reward", 2),
        ("inf reward", "reward", 2),
        ("none reward", "reward", 2),
    ],
)
def test_what_is_not_finite_is_named_by_environment_step_and_key(fit, fault, key, step):
    message = run(PPO(faulty(fault), **SMALL), fit)
    assert message.startswith(f"environment 1 returned a {key} that is not finite at step {step} of the rollout")


def test_a_final_observation_that_is_not_finite_is_named(fit):
    class Ends(Probe):
        def step(self, action):
            return self.see(np.nan), 1.0, False, True, {}

    message = run(PPO(Ends, **SMALL), fit)
    assert message.startswith("environment 0 returned a final observation that is not finite at step 0")


class Parts(Scripted):
    def __init__(self):
        super().__init__()
        inner = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.observation_space = gym.spaces.Dict({"arm": gym.spaces.Dict({"joint": inner}), "eye": inner})

    def see(self, value):
        return {"arm": {"joint": np.full(2, value, np.float32)}, "eye": np.full(2, value, np.float32)}


class Misbehaves(Parts):
    """Returns something else than the interface promises, from the third step or from ``reset``."""

    def __init__(self, change, where="step"):
        super().__init__()
        self.change, self.where, self.taken = change, where, 0

    def step(self, action):
        given = super().step(action)
        self.taken += 1
        return self.change(*given) if self.where == "step" and self.taken == 3 else given

    def reset(self, *, seed=None, options=None):
        given = super().reset(seed=seed)
        return self.change(*given) if self.where == "reset" else given


MISTAKES = {
    "reward of shape (1,)": (lambda o, r, te, tr, i: (o, np.array([r]), te, tr, i), "the reward ndarray (1,) float64 ["),
    "reward as a tensor": (lambda o, r, te, tr, i: (o, torch.tensor([r]), te, tr, i), "the reward Tensor (1,) torch.float32 ["),
    "reward in a list": (lambda o, r, te, tr, i: (o, [r], te, tr, i), "the reward list [0.30"),
    "reward as text": (lambda o, r, te, tr, i: (o, "1.5", te, tr, i), "the reward '1.5' (str): return one number"),
    "complex reward": (lambda o, r, te, tr, i: (o, 1j, te, tr, i), "the reward complex: return one number"),
    "flag None": (lambda o, r, te, tr, i: (o, r, None, tr, i), "terminated None: return True or False"),
    "flag 2": (lambda o, r, te, tr, i: (o, r, te, 2, i), "truncated 2 (int): return True or False"),
    "flag as text": (lambda o, r, te, tr, i: (o, r, "no", tr, i), "terminated 'no' (str): return True or False"),
    "flag in an array": (lambda o, r, te, tr, i: (o, r, np.array([te]), tr, i), "terminated ndarray (1,) bool [True]"),
    "flag NaN": (lambda o, r, te, tr, i: (o, r, np.nan, tr, i), "terminated nan (float): return True or False"),
    "info None": (lambda o, r, te, tr, i: (o, r, te, tr, None), "the info None: return a dict"),
    "info list": (lambda o, r, te, tr, i: (o, r, te, tr, [i]), "the info list [{}]: return a dict"),
    "four values": (lambda o, r, te, tr, i: (o, r, te or tr, i), "(observation, reward, done, info) from step, the API before"),
    "three values": (lambda o, r, te, tr, i: (o, r, te), "returned 3 values from step"),
    "nothing": (lambda o, r, te, tr, i: None, "returned None from step"),
    "part of another shape": (
        lambda o, *rest: ({**o, "arm": {"joint": np.zeros(3, np.float32)}}, *rest),
        "whose part 'arm.joint' is ndarray (3,) float32 [0.0, 0.0, 0.0], its space is Box(-inf, inf, (2,), float32)",
    ),
    "part of another dtype": (lambda o, *rest: ({**o, "eye": np.zeros(2)}, *rest), "whose part 'eye' is ndarray (2,) float64"),
    "part as a list": (lambda o, *rest: ({**o, "eye": [0.0, 0.0]}, *rest), "whose part 'eye' is list [0.0, 0.0]"),
    "part that is none": (lambda o, *rest: ({**o, "arm": 1}, *rest), "whose part 'arm' is 1 (int), a dict is promised"),
    "part missing": (lambda o, *rest: ({**o, "arm": {}}, *rest), "an observation that lacks the key 'arm.joint' of its space"),
    "part too many": (lambda o, *rest: ({**o, "ear": 0}, *rest), "has the key 'ear', which its space lacks"),
    "observation None": (lambda o, *rest: (None, *rest), "an observation that is None, a dict is promised"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_what_an_environment_returns_by_mistake_is_named_with_key_and_value(fit, name):
    change, told = MISTAKES[name]
    message = run(PPO(functools.partial(Misbehaves, change), **SMALL), fit)
    assert message.startswith("environment 0 returned")
    assert told in message
    assert "\n" not in message
    assert len(message) < 250  # not the whole space


RESETS = {
    "observation alone": (lambda o, i: o, "returned dict {'arm': {'joint': array"),
    "array alone": (lambda o, i: np.zeros(2, np.float32), "returned ndarray (2,) float32 [0.0, 0.0] from reset, not"),
    "info None": (lambda o, i: (o, None), "returned (observation, info) from reset with the info None"),
    "three values": (lambda o, i: (o, 0.0, i), "from reset, not (observation, info)"),
    "wrong part": (lambda o, i: ({**o, "eye": 0.0}, i), "in reset an observation whose part 'eye' is 0.0 (float)"),
}  # fmt: skip


@pytest.mark.parametrize("name", RESETS)
def test_what_a_reset_returns_by_mistake_is_named(fit, name):
    change, told = RESETS[name]
    message = run(PPO(functools.partial(Misbehaves, change, "reset"), **SMALL), fit)
    assert message.startswith("environment 0 returned")
    assert told in message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:.*ERROR:UserWarning")
def test_mistakes_are_named_from_worker_processes_and_in_evaluations_too(fit):
    change, told = MISTAKES["reward in a list"]
    message = run(PPO(functools.partial(Misbehaves, change), vectorization="async", **SMALL), fit)
    assert message.startswith("environment ")
    assert told in message
    with pytest.raises(EnvironmentFault, match="environment 0 returned in step the reward list"):
        PPO(functools.partial(Misbehaves, change)).evaluate(2)


class OldReset(Probe):
    def reset(self):
        return self.see(0.0)


class OldStep(Probe):
    def step(self, action):
        return self.see(0.0), 1.0, True, {}


@pytest.mark.parametrize("wrappers", [[], [functools.partial(gym.wrappers.TimeLimit, max_episode_steps=9)]])
@pytest.mark.parametrize("env", [OldReset, OldStep])
def test_the_interface_of_old_gym_is_named_within_wrappers_and_vectors_too(fit, env, wrappers):
    for model in (PPO(env, wrappers=wrappers, **SMALL), PPO(lambda num_envs: SyncVectorEnv([env] * num_envs), **SMALL)):
        message = run(model, fit)
        assert "the API before Gym 0.26" in message
        assert "\n" not in message


def test_numbers_that_mean_what_is_promised_are_taken(fit):
    class Numbers(Probe):
        def step(self, action):
            return self.see(0.0), np.array(2, np.float16), np.int64(1), np.array(False), {}

    batch = PPO(Numbers, **SMALL).rollouts.collect()
    assert (batch["reward"] == 2).all()
    assert batch["terminated"].all()
    assert not batch["truncated"].any()


@pytest.mark.parametrize("fault", ["shape", "scalar", "dtype"])
def test_an_observation_that_its_space_does_not_allow_is_named(fit, fault):
    message = run(PPO(faulty(fault, index=2), **SMALL), fit)
    assert message.startswith("environment 2 returned in step an observation that is")
    assert "Box(-10.0, 10.0, (1,), float32)" in message


def test_a_native_vector_with_wrong_observations_is_named(fit):
    class Native(VectorEnv):
        num_envs = 2
        metadata: ClassVar = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        single_observation_space = Probe().observation_space
        single_action_space = Probe().action_space

        def reset(self, *, seed=None, options=None):
            return np.zeros((2, 7), np.float32), {}

    with pytest.raises(EnvironmentFault, match=r"observations \(2, 7\) float32, its space says \(2, 1\)"):
        fit(PPO(Native, **SMALL))


@pytest.mark.parametrize(
    ("space", "wrong", "said"),
    [
        (MultiDiscrete([3, 3]), [4, 0], "of MultiDiscrete([3 3])"),
        (MultiBinary(2), [7, 0], "of MultiBinary(2)"),
        (Discrete(3), 4, "of Discrete(3)"),
        (Dict({"at": Discrete(3, start=-1), "more": Box(0, 1, (2,))}), {"at": 2, "more": [0, 0]}, "of Discrete(3, start=-1)"),
    ],
)  # fmt: skip
def test_a_native_vector_with_values_outside_of_a_discrete_space_is_named(space, wrong, said):
    class Native(VectorEnv):
        num_envs = 2
        metadata: ClassVar = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        single_observation_space, single_action_space = space, Discrete(2)

        def see(self, second):
            rows = [self.single_observation_space.sample(), second]
            if isinstance(space, Dict):
                return {key: np.array([row[key] for row in rows], part.dtype) for key, part in space.items()}
            return np.array(rows, space.dtype)

        def reset(self, *, seed=None, options=None):
            return self.see(self.single_observation_space.sample()), {}

        def step(self, actions):
            none = np.zeros(2, bool)
            return self.see(wrong), np.zeros(2), none, none, {}

    with pytest.raises(EnvironmentFault, match=rf"environment 1 of .* returned the observation .*{re.escape(said)}$"):
        PPO(Native, **SMALL).collect()


def test_what_a_step_is_given_is_its_own(fit):
    """An environment may change its action in place."""

    class Turns(gym.Env):
        observation_space, action_space = Box(0, 9, (2,)), MultiDiscrete([4, 3])

        def reset(self, *, seed=None, options=None):
            return np.zeros(2, np.float32), {}

        def step(self, action):
            seen = action.astype(np.float32)
            action %= 2
            return seen, 0.0, False, False, {}

    model = PPO(Turns, num_envs=2, num_steps=8, num_minibatches=2)
    model.seed = 1
    rollout = model.collect()
    assert (rollout["action"] > 1).any()
    assert torch.equal(rollout["observation"][1:], rollout["action"][:-1].float())


def test_a_vector_may_return_flipped_views():
    class Flips(VectorWrapper):
        def turned(self, observation):
            return np.ascontiguousarray(observation[:, ::-1])[:, ::-1]

        def reset(self, **how):
            observation, info = self.env.reset(**how)
            return self.turned(observation), info

        def step(self, actions):
            observation, *rest = self.env.step(actions)
            return self.turned(observation), *rest

    plain, flipped = (
        collected(lambda make=make: make(gym.make_vec("CartPole-v1", 2))) for make in (lambda env: env, Flips)
    )
    assert torch.equal(plain["observation"], flipped["observation"])


def test_attributes_of_a_wrapper_around_a_vector_can_be_set():
    class Scales(VectorWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.scale = 1.0

    vector = VectorEnvAdapter(EnvFactory(lambda: Scales(SyncVectorEnv([CartPoles] * 2))), 2, 60.0)
    vector.set_env_attributes({"scale": 2.0, "gravity": 3.0})
    assert (vector.env.scale, [env.unwrapped.gravity for env in vector.env.env.envs]) == (2.0, [3.0, 3.0])
    with pytest.raises(InputError, match="has no attribute or method 'size'"):
        vector.set_env_attributes({"size": 2.0})


@pytest.mark.parametrize("like", [np.zeros, torch.zeros])
def test_an_attribute_of_whole_numbers_takes_no_fractions(like):
    class Holds(gym.Wrapper):
        def __init__(self):
            super().__init__(CartPoles())
            self.flags, self.fractions = like(3) > 0, like(3)

    vector = VectorEnvAdapter(EnvFactory(Holds), 1, 60.0)
    vector.set_env_attributes({"flags": 1, "fractions": 0.5})
    env = vector.env.envs[0]
    assert env.get_wrapper_attr("flags").tolist() == [True] * 3
    assert env.get_wrapper_attr("fractions").tolist() == [0.5] * 3
    with pytest.raises(
        InputError, match=r"the attribute flags is of .*bool, which does not hold 0.5: give another value"
    ):
        vector.set_env_attributes({"flags": 0.5})


class Returns(VectorWrapper):
    """A vector whose steps, or resets, return something else than Gymnasium's do."""

    def __init__(self, mode=AutoresetMode.NEXT_STEP, make=Scripted, **changes):
        super().__init__(SyncVectorEnv([make] * 3, autoreset_mode=mode))
        self.metadata = self.env.metadata
        self.changes, self.reset_changes = changes, changes.pop("reset", None)

    def reset(self, **how):
        observation, info = self.env.reset(**how)
        return (observation, info) if self.reset_changes is None else self.reset_changes(observation, info)

    def step(self, action):
        keys = "observation", "reward", "terminated", "truncated", "info"
        given = [
            self.changes.get(key, lambda value: value)(value)
            for key, value in zip(keys, self.env.step(action), strict=True)
        ]
        return tuple(given[: self.changes.get("values", 5)])


def collected(env):
    torch.manual_seed(0)
    model = PPO(env, num_steps=16, num_minibatches=1)
    model.seed = 0
    return {key: value.clone() for key, value in model.rollouts.collect().items() if torch.is_tensor(value)}


def flags(function):
    return {"terminated": function, "truncated": function}


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    "changes",
    [
        flags(lambda flag: flag.astype(np.uint8)),
        flags(lambda flag: flag.astype(np.float32)),
        flags(lambda flag: flag.tolist()),
        flags(lambda flag: flag[:, None]),
        {"reward": lambda reward: reward.tolist()},
        {"reward": lambda reward: reward.astype(np.float64)[:, None]},
        {"reward": lambda reward: np.array(list(reward), dtype=object)},
        {"observation": lambda observation: observation.astype(np.float64)},
        {"observation": lambda observation: observation[:, 0]},
        {"observation": lambda observation: observation.tolist()},
    ],
)
def test_what_a_vector_returns_is_converted_to_what_is_promised(mode, changes):
    expected, found = collected(lambda: Returns(mode)), collected(lambda: Returns(mode, **changes))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


class Three(Scripted):
    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def see(self, value):
        return np.full(3, value, np.float32)


class Whole(Scripted):
    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (2,), np.uint8)

    def see(self, value):
        return np.full(2, int(value), np.uint8)


def second(value):
    """Changes the second of several values."""

    def change(values):
        values = list(values)
        values[1] = value
        return values

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (flags(lambda flag: flag + 2), "environment 0 of .* returned the terminated 2"),
        ({"truncated": second(None)}, "environment 1 of .* returned the truncated None"),
        ({"terminated": second("no")}, "environment 1 of .* returned the terminated 'no'"),
        ({"terminated": lambda flag: flag[:2]}, r"terminated of shape \(2,\): return an array \(3,\)"),
        ({"terminated": lambda flag: False}, r"terminated of shape \(\): return an array \(3,\)"),
        ({"reward": second("1.0")}, "environment 1 of .* returned the reward '1.0'"),
        ({"reward": second([1.0, 2.0])}, "environment 1 of .* returned the reward list"),
        ({"reward": lambda reward: reward[:2]}, r"reward of shape \(2,\): return an array \(3,\)"),
        ({"reward": lambda reward: None}, "reward None: return an array"),
        (
            {"make": Three, "observation": lambda seen: seen[:, :1]},
            r"observations \(3, 1\) float32, its space says \(3, 3\)",
        ),
        (
            {"make": Three, "observation": lambda seen: seen[:1]},
            r"observations \(1, 3\) float32, its space says \(3, 3\)",
        ),
        ({"make": Whole, "observation": lambda seen: seen + 0.5}, "environment 0 of .* whole numbers that uint8"),
        (
            {"make": Whole, "observation": lambda seen: seen.astype(int) + 256},
            "environment 0 of .* whole numbers that uint8",
        ),
        ({"make": Parts, "observation": lambda seen: {"arm": seen["arm"]}}, "lacks the key 'eye'"),
        (
            {"make": Parts, "observation": lambda seen: {**seen, "nose": 1}},
            "has the key 'nose', which its space lacks",
        ),
        ({"make": Parts, "observation": lambda seen: {**seen, "arm": {}}}, "lacks the key 'arm.joint'"),
        (
            {"make": Parts, "observation": lambda seen: {**seen, "arm": {"joint": seen["eye"][:, :1]}}},
            r"observations arm.joint \(3, 1\) float32, its space says \(3, 2\)",
        ),
        ({"values": 4}, r"returned \(observation, reward, done, info\) from step, the API before Gym 0.26"),
        ({"info": lambda info: None}, "returned in step the info None: return a dict"),
        (
            {"reset": lambda seen, info: seen},
            r"returned ndarray \(3, 1\) float32 .* from reset, not \(observation, info\)",
        ),
    ],
)
def test_what_a_vector_returns_is_refused_where_it_cannot_be_converted(changes, message):
    with pytest.raises(EnvironmentFault, match=message) as caught:
        collected(lambda: Returns(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["terminated", "reward", "observation", "final_obs"])
def test_a_vector_of_tensors_is_converted_or_refused_too(key):
    class Tensors(CartPole):
        def __init__(self, change):
            super().__init__(4, max_episode_steps=5)
            self.change = change

        def step(self, actions):
            keys = "observation", "reward", "terminated", "truncated", "final_obs"
            *given, info = super().step(actions)
            named = dict(zip(keys, (*given, info["final_obs"]), strict=True))
            named[key] = self.change(named[key])
            return *(named[name] for name in keys[:4]), {"final_obs": named["final_obs"]}

    expected = collected(lambda: Tensors(lambda value: value))
    for change in (lambda value: value.double(), lambda value: value.unsqueeze(-1)):
        found = collected(lambda change=change: Tensors(change))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    with pytest.raises(EnvironmentFault, match=f"returned {key.replace('final_obs', 'observation')} that is Tensor"):
        collected(lambda: Tensors(lambda value: value[:1]))


def test_a_lost_life_may_be_a_number(fit):
    lost = lambda info: {**info, "life_lost": np.array([1, 0, 0])}  # noqa: E731
    assert collected(lambda: Returns(info=lost))["terminated"][:, 0].all()


def test_a_vector_that_does_not_say_how_it_resets_is_refused():
    def make():
        env = SyncVectorEnv([Endless] * 2)
        del env.metadata["autoreset_mode"]
        return env

    with pytest.raises(InputError, match=r"make has metadata\['autoreset_mode'\] = None: it must be one of"):
        PPO(make, num_steps=8).rollouts.collect()


def test_a_worker_that_hangs_is_named_in_time(fit):
    started = time.monotonic()
    message = run(PPO(faulty("hang"), vectorization="async", env_timeout_s=1.0, **SMALL), fit)
    assert "environment [1] did not answer within 1.0 s in step" in message
    assert time.monotonic() - started < 40


def test_a_worker_that_dies_is_named(fit):
    message = run(PPO(faulty("die"), vectorization="async", **SMALL), fit)
    assert "the worker process of environment [1] died in step: killed by signal 9 (SIGKILL)" in message


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "environment 1 raised ZeroDivisionError in step: the pole is at infinity"),
        ("exit", "environment 1 raised SystemExit: 3"),
        ("hang", "environment [0, 1] did not answer within 1.0 s in step"),
        ("die", "the worker process of environment [0, 1] died in step: killed by signal 9 (SIGKILL)"),
    ],
)
def test_a_worker_of_several_environments_is_named_by_all_and_a_fault_by_its_own(fit, fault, message):
    assert message in run(PPO(faulty(fault), vectorization="async", num_workers=2, env_timeout_s=1.0, **SMALL), fit)
    assert not multiprocessing.active_children()


def test_making_worker_processes_leaves_the_random_generators_of_this_one_alone():
    random.seed(7)
    torch.manual_seed(7)
    expected = random.Random(7).random(), torch.rand((), generator=torch.Generator().manual_seed(7))
    model = PPO("CartPole-v1", num_envs=2, num_steps=8, num_minibatches=1, vectorization="async")
    random.seed(7)
    torch.manual_seed(7)
    model.seed = 1
    model.collect()
    model.close_environments()
    assert (random.random(), torch.rand(())) == expected


def test_rollouts_do_not_depend_on_the_number_of_workers():
    def collected(**how):
        lightning.seed_everything(3, verbose=False)
        model = PPO("CartPole-v1", num_envs=5, num_steps=64, num_minibatches=1, **how)
        rollouts = [model.collect().clone() for _ in range(2)]
        processes = len(multiprocessing.active_children())
        model.close_environments()
        return rollouts, processes

    expected, none = collected()
    assert none == 0
    for num_workers, started in ((1, 1), (3, 3), (None, 5)):
        rollouts, processes = collected(vectorization="async", num_workers=num_workers)
        assert processes == started
        for one, other in zip(rollouts, expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("observation", "action", "reward", "truncated"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_workers": 2},
            "num_workers=2 are processes, which vectorization=sync has none of: give vectorization=async",
        ),
        ({"num_workers": 9, "vectorization": "async"}, "num_workers=9 are more than num_envs=8: give 8 or fewer"),
        ({"num_workers": 0, "vectorization": "async"}, "num_workers must be a whole number of 1 or more"),
        (
            {"env": lambda: SyncVectorEnv([Endless] * 2), "num_workers": 2, "vectorization": "async"},
            "num_workers=2 are processes of single environments, and <lambda> is a vector: leave it out",
        ),
    ],
)
def test_workers_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        PPO(**{"env": "CartPole-v1", **options})


def test_a_reset_that_fails_in_a_vector_without_autoreset_is_named():
    def make():
        fails = functools.partial(Faulty, "raise", where="reset", spare_first_reset=True)
        return SyncVectorEnv([fails] * 2, autoreset_mode=AutoresetMode.DISABLED)

    with pytest.raises(
        EnvironmentFault, match=r"raised ZeroDivisionError in reset: the pole is at infinity\n\nTraceback"
    ):
        PPO(make, num_steps=16).rollouts.collect()


def test_a_constructor_that_raises_is_named():
    def make():
        raise ValueError("no licence")

    with pytest.raises(InputError, match="making make raised ValueError: no licence"):
        PPO(make)


def test_one_environment_is_not_several():
    with pytest.raises(InputError, match="env is one Endless"):
        PPO(Endless())


def test_a_function_by_its_path():
    assert PPO("probes.Endless", num_steps=8).rollouts.collect().batch_size == (8, 8)
    with pytest.raises(InputError, match=r"env=probes.Nothing: cannot import it"):
        PPO("probes.Nothing")


def test_spaces_without_dimensions_and_spaces_that_hold_nothing():
    class Scalar(Probe):
        def __init__(self):
            super().__init__()
            self.action_space = gym.spaces.Box(-1, 1, ())

        def step(self, action):
            assert self.action_space.contains(np.asarray(action)), action
            return self.see(0.0), 0.0, True, False, {}

    model = PPO(Scalar, num_steps=8)
    model.on_train_batch_start(batch := model.rollouts.collect(), 0)
    assert batch["action"].shape == (8, 8)
    assert model.predict(np.zeros((5, 1))).shape == (5,)

    class Empty(Probe):
        def __init__(self):
            super().__init__()
            self.observation_space = gym.spaces.Box(-1, 1, (0,))

    with pytest.raises(InputError, match="holds nothing"):
        PPO(Empty)


def test_predict_refuses_a_cell_that_is_not_there():
    with pytest.raises(InputError, match=r"predict needs observations of Discrete\(16\)"):
        PPO("FrozenLake-v1").predict(99)


def test_an_async_timeout_is_an_option_with_effect():
    environments = VectorEnvAdapter(EnvFactory("CartPole-v1", vectorization="async"), 2, 7.5)
    assert environments.timeout_s == 7.5
    environments.reset(0)
    environments.close()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPol-v1", "no environment 'CartPol-v1': did you mean CartPole-v1"),
        ("cartpole-v1", "did you mean CartPole-v"),
        ("LunarLander-v2", "did you mean LunarLander-v3"),
        ("Xyzzyx-v77", "no environment 'Xyzzyx-v77': list what is there"),
        ("no_such_package:Thing-v0", "cannot import no_such_package"),
    ],
)
def test_an_unknown_id_has_close_matches(env, message):
    with pytest.raises(InputError, match=message):
        PPO(env)


def test_a_missing_extra_is_named_with_the_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "Box2D", None)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.lunar_lander", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.bipedal_walker", raising=False)
    with pytest.raises(InputError, match=r'pip install "ppo-lightning\[box2d\]"'):
        PPO("LunarLander-v3")


def test_wrong_env_kwargs_are_named():
    with pytest.raises(InputError, match=r"making CartPole-v1 raised TypeError.*check env, env_kwargs"):
        PPO("CartPole-v1", env_kwargs={"gravity_of_jupiter": 1})


def test_unsupported_spaces_are_named():
    class Strange(Probe):
        def __init__(self):
            super().__init__()
            self.observation_space = gym.spaces.Dict({"a": gym.spaces.Text(2)})

    with pytest.raises(InputError, match=r"Text.*is not supported"):
        PPO(Strange)


def test_what_a_callable_must_make():
    with pytest.raises(InputError, match=r"must return a gymnasium.vector.VectorEnv or a gymnasium.Env"):
        PPO(lambda: 3)


def test_wrappers_go_around_single_environments():
    wrapper = functools.partial(gym.wrappers.TimeLimit, max_episode_steps=3)
    with pytest.raises(InputError, match="vector_entry_point has none"):
        PPO("CartPole-v1", vectorization="vector_entry_point", wrappers=[wrapper])
    with pytest.raises(InputError, match="wrap inside it"):
        PPO(lambda: SyncVectorEnv([Probe]), wrappers=[wrapper])
    with pytest.raises(InputError, match="VectorEnv already"):
        PPO(SyncVectorEnv([Endless] * 2), wrappers=[wrapper])
    model = PPO(Endless, wrappers=[wrapper], num_envs=2, num_steps=4, num_minibatches=1)
    assert model.rollouts.collect()["truncated"].tolist() == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]


def test_no_vector_entry_point_is_reported():
    with pytest.raises(InputError, match="Pendulum-v1 has no vector entry point"):
        PPO("Pendulum-v1", vectorization="vector_entry_point")


def test_too_many_minibatches_for_a_vector_that_spends_steps_on_resets():
    make = lambda: SyncVectorEnv([lambda: Scripted(((1, "terminated"),))] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)  # noqa: E731
    model = PPO(make, num_steps=8, num_minibatches=8)
    assert len(model.training_samples(_with_advantage(model))["advantage"]) >= 8
    with pytest.raises(InputError, match="spends a step on every reset"):
        PPO(make, num_steps=8, num_minibatches=9).rollouts.collect()


def _with_advantage(model):
    batch = model.rollouts.collect()
    model.on_train_batch_start(batch, 0)
    return batch


def test_same_step_without_final_observations_is_refused():
    class Forgetful(SyncVectorEnv):
        def step(self, actions):
            *rest, info = super().step(actions)
            info.pop("final_obs", None)
            return *rest, info

    make = lambda: Forgetful([Endless] * 2, autoreset_mode=AutoresetMode.SAME_STEP)  # noqa: E731
    with pytest.raises(EnvironmentFault, match="gives no info"):
        PPO(make, num_steps=32).rollouts.collect()


def test_a_callable_gets_the_number_of_environments_where_it_asks():
    made = []

    def make(num_envs, limit):
        made.append(num_envs)
        return SyncVectorEnv([lambda: Endless(limit)] * num_envs)

    model = PPO(make, env_kwargs={"limit": 4}, num_envs=5, num_steps=8)
    assert model.rollouts.collect().batch_size == (8, 5)
    assert made == [5]
    model.evaluate(2)
    assert made == [5, 2]


# --- what predict is given ---------------------------------------------------------------------------------------------


class Sees(Probe):
    def __init__(self, space):
        super().__init__()
        self.observation_space = space


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8)
IMAGE = Box(0, 255, (3, 40, 40), np.uint8)
PLACE = Box(-1, 1, (2,), np.float32)
COUNTS = Box(-5, 5, (2,), np.int32)


@pytest.mark.parametrize(
    ("space", "given", "says"),
    [
        (IMAGE, PIXELS / 255, "which is no whole number"),
        (IMAGE, (PIXELS / 255).astype(np.float32), "which is no whole number"),
        (IMAGE, PIXELS.astype(np.float32) * 2 - 255, "lies outside of 0 to 255"),
        (IMAGE, PIXELS.astype(np.int64) + 1, "256, which lies outside of 0 to 255"),
        (IMAGE, np.where(PIXELS == 0, np.nan, PIXELS), "nan, which is no whole number"),
        (IMAGE, np.where(PIXELS == 0, np.inf, PIXELS), "inf, which lies outside of"),
        (PLACE, [np.nan, 0.0], "nan, which is not finite"),
        (PLACE, [0.0, -np.inf], "-inf, which is not finite"),
        (PLACE, np.array([0.0, 1e300]), "1e\\+300, which is not finite"),
        (PLACE, [None, 0.0], "what is no number"),
        (PLACE, ["0", "1"], "what is no number"),
        (PLACE, [1j, 0], "what is no number"),
        (COUNTS, [0.5, 1.0], "0.5, which is no whole number"),
        (COUNTS, [6, 0], "6, which lies outside of -5 to 5"),
        (COUNTS, [2**40, 0], "which lies outside of -5 to 5"),
        (Discrete(4), 1.5, "1.5, which is no whole number"),
        (Discrete(4), np.nan, "nan, which is no whole number"),
        (Discrete(4, start=2), 1, "1, which lies outside of 2 to 5"),
        (MultiDiscrete([2, 3]), [1, 3], "3, which lies outside of 0 to 2"),
        (MultiDiscrete([2, 3]), [0.5, 1], "0.5, which is no whole number"),
        (MultiBinary(2), [0, 2], "2, which lies outside of 0 to 1"),
        (MultiBinary(2), [0.5, 1], "0.5, which is no whole number"),
    ],
)
def test_predict_refuses_what_cannot_be_of_the_space(space, given, says):
    model = PPO(partial(Sees, space), num_envs=2)
    for observation in (given, [given, given]):
        with pytest.raises(
            InputError, match=rf"predict needs observations of .*{says}.*: give them as the environment does"
        ):
            model.predict(observation)
    model = PPO(partial(Sees, Dict({"part": space, "other": PLACE})), num_envs=2)
    with pytest.raises(InputError, match=rf"{says}.* for part: give them"):
        model.predict({"part": given, "other": [0.0, 0.0]})


@pytest.mark.parametrize(
    ("space", "given"),
    [
        (IMAGE, PIXELS.astype(np.float64)),
        (IMAGE, PIXELS.astype(np.int64)),
        (PLACE, [3, -2]),  # outside of the bounds, as rollouts take it, too
        (PLACE, np.array([0.5, -0.5])),
        (COUNTS, [1.0, -5.0]),
        (Discrete(4), 3.0),
        (Discrete(4), np.uint8(3)),
        (MultiDiscrete([2, 3]), [1.0, 2.0]),
        (MultiBinary(2), [True, False]),
    ],
)
def test_predict_takes_values_of_the_space_in_other_dtypes(space, given):
    model = PPO(partial(Sees, space), num_envs=2)
    observation = np.asarray(given).astype(space.dtype)
    assert model.predict(given) == model.predict(observation)
    assert model.predict([given, given]).tolist() == model.predict(np.stack([observation, observation])).tolist()


# --- wrappers with statistics of their own -----------------------------------------------------------------------------


class Mine(gym.wrappers.NormalizeObservation):
    pass


class Moments:
    def __init__(self):
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4


class Scaled(gym.RewardWrapper):
    """As wrappers of other packages do it."""

    def __init__(self, env):
        super().__init__(env)
        self.ret_rms = Moments()

    def reward(self, reward):
        return reward / self.ret_rms.var


class OfParts(gym.ObservationWrapper):
    def __init__(self, env):
        super().__init__(env)
        self.statistics = {"place": Moments()}

    def observation(self, observation):
        return observation


OBSERVATION, REWARD = "normalize_observation: true", "normalize_reward: true"
NORMALIZE = gym.wrappers.NormalizeObservation
IN_VECTORS = gym.wrappers.vector


@pytest.mark.parametrize(
    ("wrapper", "advice"),
    [
        (NORMALIZE, OBSERVATION),
        (gym.wrappers.NormalizeReward, REWARD),
        (partial(gym.wrappers.NormalizeReward, gamma=0.9), REWARD),
        (Mine, OBSERVATION),
        (Scaled, REWARD),
        (OfParts, f"{OBSERVATION} and {REWARD}"),
    ],
)
@pytest.mark.parametrize("where", ["wrappers", "below another", "callable", "vector", "async vector", "instance"])
def test_wrappers_with_statistics_of_their_own_are_refused(wrapper, advice, where, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make = lambda: wrapper(gym.make("Pendulum-v1"))  # noqa: E731
    below = lambda: gym.wrappers.TimeAwareObservation(make())  # noqa: E731
    options: dict[str, Any] = {
        "wrappers": {"env": "Pendulum-v1", "wrappers": [wrapper]},
        "below another": {"env": "Pendulum-v1", "wrappers": [wrapper, gym.wrappers.TimeAwareObservation]},
        "callable": {"env": below},
        "vector": {"env": lambda num_envs: SyncVectorEnv([below] * num_envs)},
        "async vector": {"env": lambda num_envs: AsyncVectorEnv([below] * num_envs)},
        "instance": {"env": SyncVectorEnv([make])} if where == "instance" else {},
    }[where]
    if where == "async vector" and wrapper is not NORMALIZE:
        pytest.skip("worker processes are slow to start")
    with pytest.raises(InputError, match=rf"normalises by running statistics of its own: .*set {advice}"):
        PPO(**options, num_envs=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrapper", "advice"), [(IN_VECTORS.NormalizeObservation, OBSERVATION), (IN_VECTORS.NormalizeReward, REWARD)]
)
def test_vectors_wrapped_in_statistics_of_their_own_are_refused(wrapper, advice):
    def make(num_envs):
        vector = wrapper(gym.make_vec("Pendulum-v1", num_envs, vectorization_mode="sync"))
        return IN_VECTORS.RecordEpisodeStatistics(vector)

    with pytest.raises(InputError, match=rf"wrapped in {wrapper.__name__}, which .*set {advice}"):
        PPO(make, num_envs=2)


def test_an_id_that_is_registered_with_such_a_wrapper_is_refused(monkeypatch):
    spec = gym.spec("Pendulum-v1")
    own = gym.envs.registration.WrapperSpec("Mine", "test_envs:Mine", {})
    monkeypatch.setitem(gym.registry, "Own-v0", dataclasses.replace(spec, id="Own-v0", additional_wrappers=(own,)))
    with pytest.raises(InputError, match="Own-v0 is wrapped in Mine"):
        PPO("Own-v0", num_envs=2)


def test_wrappers_without_statistics_of_their_own_are_taken():
    unit = np.full(3, -1, np.float32), np.full(3, 1, np.float32)
    wrappers = [
        gym.wrappers.RecordEpisodeStatistics,
        partial(gym.wrappers.RescaleObservation, min_obs=unit[0], max_obs=unit[1]),
        partial(gym.wrappers.TransformReward, func=lambda reward: reward / 10),
        partial(gym.wrappers.ClipReward, min_reward=-1.0, max_reward=1.0),
        gym.wrappers.TimeAwareObservation,
    ]
    assert PPO("Pendulum-v1", wrappers=wrappers, num_envs=2).observation_space.shape == (4,)


class Draws(Probe):
    """Shows a number of each stream that everything in its process shares."""

    def __init__(self):
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 1, (4,), np.float64)
        self.made = np.random.random()  # noqa: NPY002

    def see(self, value):
        drawn = self.made, random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
        return np.array(drawn)

    def step(self, action):
        return self.see(0.0), 0.0, False, False, {}


def test_each_worker_draws_its_own_numbers_from_shared_streams_and_the_same_with_the_same_seed():
    starts = []
    for seed in (7, 7, 80):
        torch.manual_seed(seed)
        environments = VectorEnvAdapter(EnvFactory(Draws, vectorization="async"), 4, 60.0)
        seen = [
            environments.reset(seed).copy(),
            *(environments.step(np.zeros(4, int)).observation.copy() for _ in range(15)),
        ]
        environments.close()
        starts.append(np.stack(seen))
    first, same, other = starts
    assert np.array_equal(first, same)
    assert len(np.unique(first[0, :, 0])) == 4
    for drawn in first[..., 1:].reshape(-1, 3).T:
        assert len(np.unique(drawn)) == 64
    assert not np.isin(first, other).any()


def test_a_worker_that_replaces_another_draws_other_numbers():
    class Dies(Draws):
        def step(self, action):
            if action == 1:
                raise ValueError("once")
            return super().step(action)

    restarts = RestartBudget(2)
    environments = VectorEnvAdapter(EnvFactory(Dies, vectorization="async", restarts=True), 2, 60.0, restarts=restarts)
    first = environments.reset(3).copy()
    with pytest.warns(UserWarning, match="restarted .1 of 2"):
        again = environments.step(np.array([1, 0])).observation.copy()
    environments.close()
    assert again[0, 2] != first[0, 2]
    assert len(np.unique(again[:, 2])) == 2


class Counter(gym.Env):
    """Episodes of changing length, whose infos come and go."""

    def __init__(self, space):
        self.observation_space, self.action_space = copy.deepcopy(space), MultiDiscrete([3, 2])
        self.number = self.steps = 0

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.number = seed
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {"first": self.number} if self.number % 2 else {}

    def step(self, action):
        self.steps += 1
        info = {"action": action.copy(), "nested": {"share": self.number / 2}} if (self.steps + self.number) % 3 else {}
        done = self.steps >= 2 + self.number
        return (
            self.observation_space.sample(),
            action[0] - 0.5,
            done and self.number != 1,
            done and self.number == 1,
            info,
        )


@pytest.mark.parametrize(
    "space",
    [
        Box(-1, 1, (2, 3)),
        Box(0, 255, (4,), np.uint8),
        Discrete(5),
        MultiBinary(3),
        Dict({"a": Box(-1, 1, (2,)), "b": Tuple((Discrete(3), Box(-1, 1, ())))}),
        Text(4),
    ],
    ids=lambda space: type(space).__name__,
)
@pytest.mark.parametrize(
    "how", [{}, {"vectorization": "async"}, {"vectorization": "async", "num_workers": 3}], ids=["sync", "async", "3"]
)
def test_environments_step_as_in_gymnasiums_vector(space, how):
    if how and isinstance(space, Text):
        pytest.skip("Gymnasium shares no texts between processes")

    def run(vector):
        rng = np.random.default_rng(0)
        results = [copy.deepcopy(vector.reset(seed=0))]
        for step in range(30):
            results.append(copy.deepcopy(vector.step(rng.integers([3, 2], size=(4, 2)))))
            if step == 20:
                results.append(
                    copy.deepcopy(vector.reset(options={"reset_mask": np.array([True, False, False, True])}))
                )
        vector.close()
        return results

    make = functools.partial(Counter, space)
    theirs = run(SyncVectorEnv([make] * 4, autoreset_mode=AutoresetMode.SAME_STEP))
    assert data_equivalence(run(EnvFactory(make, **how)(4, 0)), theirs, exact=True)
